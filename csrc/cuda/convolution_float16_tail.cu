#include "convolution_launch.h"

namespace esr::cuda {

void launch_float16_tail(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Float16, Variant::kTail>("convolution_float16_tail", convolution, stream, overlap);
}

}  // namespace esr::cuda
