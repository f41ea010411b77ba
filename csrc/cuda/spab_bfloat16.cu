#include "spab_kernel.h"

namespace esr::cuda {

void launch_spab_bfloat16(const Spab& spab, device::Stream stream, bool overlap) {
  launch_spab_instance<BFloat16>(spab.large ? "spab_large_bfloat16" : "spab_bfloat16", spab, stream, overlap);
}

}  // namespace esr::cuda
