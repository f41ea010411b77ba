#include "winograd_kernel.h"

namespace esr::cuda {

void launch_winograd_bfloat16(const Winograd& winograd, device::Stream stream, bool overlap) {
  launch_winograd_instance<BFloat16>("winograd_bfloat16", winograd, stream, overlap);
}

}  // namespace esr::cuda
