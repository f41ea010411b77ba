#include "convolution_launch.h"

namespace esr::cuda {

void launch_float16(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Float16, false>("convolution_float16", convolution, stream, overlap);
}

}  // namespace esr::cuda
