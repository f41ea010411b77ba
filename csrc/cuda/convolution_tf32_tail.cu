#include "convolution_launch.h"

namespace esr::cuda {

void launch_tf32_tail(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Tf32, Variant::kTail>("convolution_tf32_tail", convolution, stream, overlap);
}

}  // namespace esr::cuda
