#include "convolution_launch.h"

namespace esr::cuda {

void launch_bfloat16_backward(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<BFloat16, Variant::kBackward>("convolution_bfloat16_backward", convolution, stream, overlap);
}

}  // namespace esr::cuda
