#include "convolution_launch.h"

namespace esr::cuda {

void launch_float16_half_sums(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Float16, Variant::kHalfSums>("convolution_float16_half_sums", convolution, stream, overlap);
}

}  // namespace esr::cuda
