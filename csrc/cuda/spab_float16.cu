#include "spab_kernel.h"

namespace esr::cuda {

void launch_spab_float16(const Spab& spab, device::Stream stream, bool overlap) {
  launch_spab_instance<Float16>(spab.large ? "spab_large_float16" : "spab_float16", spab, stream, overlap);
}

}  // namespace esr::cuda
