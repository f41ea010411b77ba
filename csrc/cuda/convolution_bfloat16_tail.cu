#include "convolution_launch.h"

namespace esr::cuda {

void launch_bfloat16_tail(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<BFloat16, Variant::kTail>("convolution_bfloat16_tail", convolution, stream, overlap);
}

}  // namespace esr::cuda
