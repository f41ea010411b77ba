// Cooperative grids in the emulator: all blocks are alive, each with its own fibers, and take turns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "launch.h"

namespace esr::device {

inline void set_flag(uint32_t* flag, uint32_t value, emulator::Site site = emulator::Site::current()) {
  emulator::machine().set_flag(flag, value, site);
}
inline void wait_for_flag(const uint32_t* flag, uint32_t value, emulator::Site site = emulator::Site::current()) {
  emulator::machine().wait_for_flag(flag, value, site);
}

// How many blocks of this shape are resident at once, as far as threads and shared memory decide.
template <typename Args>
int64_t resident_blocks(const char*, void (*)(Args), const LaunchShape& shape) {
  constexpr int kReserved = 1024, kThreads = 1536;  // of a block's shared memory, by the runtime; of a multiprocessor
  const Properties& p = properties();
  const int each = std::min(kThreads / shape.threads, p.shared_bytes_in_all / (shape.shared_bytes + kReserved));
  return int64_t{p.multiprocessors} * each;
}

// Starts a grid whose blocks are resident all at once, and may wait for each other.
template <typename Args>
void launch_cooperative(const char* name, void (*kernel)(Args), const LaunchShape& shape, Stream, const Args& args) {
  const int64_t most = resident_blocks(name, kernel, shape), blocks = shape.blocks * shape.rows;
  if (blocks > most) {
    emulator::refuse(name, "a cooperative grid of " + std::to_string(blocks) + " blocks, of which " +
                               std::to_string(most) + " are resident at once");
  }
  emulator::run(name, kernel, shape, false, true, args);
}

}  // namespace esr::device
