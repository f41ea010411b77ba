#include "convolution_launch.h"

namespace esr::cuda {

void launch_tf32x3_backward(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Tf32x3, Variant::kBackward>("convolution_tf32x3_backward", convolution, stream, overlap);
}

}  // namespace esr::cuda
