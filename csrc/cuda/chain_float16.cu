#include "chain_kernel.h"

namespace esr::cuda {

int64_t resident_chain_float16(const device::LaunchShape& shape) {
  return device::resident_blocks("chain_float16", chain_instance<Float16>(shape), shape);
}

void launch_chain_float16(const Chain& chain, device::Stream stream) {
  device::launch_cooperative("chain_float16", chain_instance<Float16>(chain.shape), chain.shape, stream, chain.args);
}

}  // namespace esr::cuda
