#include "convolution_launch.h"

namespace esr::cuda {

void launch_float16(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Float16, Variant::kForward>("convolution_float16", convolution, stream, overlap);
}

}  // namespace esr::cuda
