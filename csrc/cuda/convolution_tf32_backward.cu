#include "convolution_launch.h"

namespace esr::cuda {

void launch_tf32_backward(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Tf32, Variant::kBackward>("convolution_tf32_backward", convolution, stream, overlap);
}

}  // namespace esr::cuda
