#include "convolution_launch.h"

namespace esr::cuda {

void launch_float16_backward(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Float16, Variant::kBackward>("convolution_float16_backward", convolution, stream, overlap);
}

}  // namespace esr::cuda
