#include "wgmma_kernel.h"

namespace esr::cuda {

void launch_wgmma_float16(const Wgmma& wgmma, device::Stream stream, bool overlap) {
  launch_wgmma_instance<Float16>("wgmma_float16", "wgmma_float16_tail", wgmma, stream, overlap);
}

}  // namespace esr::cuda
