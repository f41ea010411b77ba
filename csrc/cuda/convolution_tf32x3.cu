#include "convolution_launch.h"

namespace esr::cuda {

void launch_tf32x3(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Tf32x3, Variant::kForward>("convolution_tf32x3", convolution, stream, overlap);
}

}  // namespace esr::cuda
