#include "winograd_kernel.h"

namespace esr::cuda {

void launch_winograd_float16(const Winograd& winograd, device::Stream stream, bool overlap) {
  launch_winograd_instance<Float16>("winograd_float16", winograd, stream, overlap);
}

}  // namespace esr::cuda
