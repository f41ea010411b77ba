#include "convolution_launch.h"

namespace esr::cuda {

void launch_tf32x3_tail(const Convolution& convolution, device::Stream stream, bool overlap) {
  launch_instance<Tf32x3, Variant::kTail>("convolution_tf32x3_tail", convolution, stream, overlap);
}

}  // namespace esr::cuda
