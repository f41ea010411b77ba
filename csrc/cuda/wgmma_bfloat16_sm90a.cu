#include "wgmma_kernel.h"

namespace esr::cuda {

void launch_wgmma_bfloat16(const Wgmma& wgmma, device::Stream stream, bool overlap) {
  launch_wgmma_instance<BFloat16>("wgmma_bfloat16", "wgmma_bfloat16_tail", wgmma, stream, overlap);
}

}  // namespace esr::cuda
