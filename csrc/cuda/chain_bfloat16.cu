#include "chain_kernel.h"

namespace esr::cuda {

int64_t resident_chain_bfloat16(const device::LaunchShape& shape) {
  return device::resident_blocks("chain_bfloat16", chain_instance<BFloat16>(shape), shape);
}

void launch_chain_bfloat16(const Chain& chain, device::Stream stream) {
  device::launch_cooperative("chain_bfloat16", chain_instance<BFloat16>(chain.shape), chain.shape, stream, chain.args);
}

}  // namespace esr::cuda
