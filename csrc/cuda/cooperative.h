// Grids whose blocks are resident all at once, and wait for each other.
#pragma once

#include "launch.h"

#ifdef ESR_EMULATOR
#include "../emulator/cooperative.h"
#else

#include <algorithm>

namespace esr::device {

#ifdef __CUDACC__

// Between blocks: what a block has written to global memory before a barrier, after which one of its threads sets a
// flag, is there for a thread that has waited for it, and after a barrier for that one's block. A flag counts up; a
// thread goes on when it has come to `value`, or beyond.
ESR_DEVICE void set_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
ESR_DEVICE void wait_for_flag(const uint32_t* flag, uint32_t value) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  } while (static_cast<int32_t>(found - value) < 0);
}

// How many blocks of this shape the device holds at once; 0 where it has no cooperative grids.
template <typename Args>
int64_t resident_blocks(const char* name, void (*kernel)(Args), const LaunchShape& shape) {
  constexpr int kReserved = 1024, kThreads = 1536;  // of a block's shared memory, by the runtime; of a multiprocessor
  const Properties& p = properties();
  int each = 0;
  if (rehearsing()) {
    each = std::min(kThreads / shape.threads, p.shared_bytes_in_all / (shape.shared_bytes + kReserved));
  } else {
    int device = 0, supported = 0;
    detail::check(cudaGetDevice(&device), name);
    detail::check(cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, device), name);
    if (supported == 0) return 0;
    const auto* function = reinterpret_cast<const void*>(kernel);
    detail::prepare(function, name, shape.shared_bytes);
    detail::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, shape.threads,
                                                                static_cast<size_t>(shape.shared_bytes)),
                  name);
  }
  return int64_t{p.multiprocessors} * each;
}

// Starts such a grid, after everything before it has finished. More blocks than are resident at once are an error.
template <typename Args>
void launch_cooperative(const char* name, void (*kernel)(Args), const LaunchShape& shape, Stream stream,
                        const Args& args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  detail::launch_with(&attribute, name, kernel, shape, stream, args);
}

#endif

}  // namespace esr::device

#endif
