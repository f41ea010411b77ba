#include "convolution_launch.h"

namespace esr::cuda {

void launch_tf32(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Tf32, Variant::kForward>("convolution_tf32", convolution, stream, overlap);
}

}  // namespace esr::cuda
