#include "convolution_launch.h"

namespace esr::cuda {

void launch_bfloat16(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<BFloat16, Variant::kForward>("convolution_bfloat16", convolution, stream, overlap);
}

}  // namespace esr::cuda
