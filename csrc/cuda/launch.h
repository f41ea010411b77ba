// Launching kernels from the host: CUDA's runtime, or the emulator.
#pragma once

#include <cstdint>

#include "device.h"

#ifdef ESR_EMULATOR
#include "../emulator/launch.h"
#else

// Units with kernels are read several times, for the host and the architectures: nothing of PyTorch is included here.
namespace esr::device {

using Stream = cudaStream_t;

struct LaunchShape {
  int64_t blocks = 1;  // block_index()
  int rows = 1;        // block_row()
  int threads = 128;
  int shared_bytes = 0;
  int instance = 0;  // what a kernel with a number in its template has there, for reports
};

struct Properties {
  int capability = 0;  // 86 for compute capability 8.6
  int multiprocessors = 0;
  int shared_bytes = 0;         // of one block, at most
  int shared_bytes_in_all = 0;  // of one multiprocessor
};

// Of the current device.
const Properties& properties();

// Whether this thread's launches are listed instead of started (rehearsal.h).
bool rehearsing();

// Memory that kernels may touch; the emulator reports every other access.
class AllowedMemory {
 public:
  void add(const void*, int64_t, bool, const char*) {}
};

namespace detail {
// Whether a rehearsal has taken the launch.
bool rehearse(const char* name, const LaunchShape& shape);
void prepare(const void* kernel, const char* name, int shared_bytes);
void check(cudaError_t status, const char* name);
}  // namespace detail

#ifdef __CUDACC__
namespace detail {
template <typename Args>
void launch_with(const cudaLaunchAttribute* attribute, const char* name, void (*kernel)(Args), const LaunchShape& shape,
                 Stream stream, const Args& args) {
  if (rehearse(name, shape)) return;
  prepare(reinterpret_cast<const void*>(kernel), name, shape.shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.rows));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = const_cast<cudaLaunchAttribute*>(attribute);
  config.numAttrs = attribute == nullptr ? 0 : 1;
  check(cudaLaunchKernelEx(&config, kernel, args), name);
}
}  // namespace detail

// Starts a kernel. `overlap`: it may start before the kernels before it have finished, and calls
// wait_for_previous_grid() before it touches what they write.
template <typename Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, Stream stream, bool overlap,
            const Args& args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const bool early = overlap && properties().capability >= 90;
  detail::launch_with(early ? &attribute : nullptr, name, kernel, shape, stream, args);
}
#endif

}  // namespace esr::device

#endif
