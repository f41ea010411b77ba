// Launching kernels in the emulator: at once, block after block, in the calling thread.
//
// ESR_EMULATOR_ORDER=forward|reverse|random:SEED is the order in which threads and blocks take turns. An error found in
// a kernel is thrown as a std::runtime_error.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>

#include "device.h"

namespace esr::device {

using Stream = void*;

struct LaunchShape {
  int64_t blocks = 1;
  int rows = 1;
  int threads = 128;
  int shared_bytes = 0;
  int instance = 0;  // what a kernel with a number in its template has there, for reports
};

struct Properties {
  int capability = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;
  int shared_bytes_in_all = 0;
};

namespace emulator {

// Of compute capability 8.6, with so few multiprocessors that persistent kernels go round several times.
inline Properties pretended{86, 3, 99 * 1024, 100 * 1024};
inline std::optional<Order> chosen_order;

// The names of this thread's launches since they were last asked for, of the last few hundred.
inline std::deque<std::string>& launched() {
  static thread_local std::deque<std::string> names;
  return names;
}

inline Order order() {
  if (chosen_order) return *chosen_order;
  const char* text = std::getenv("ESR_EMULATOR_ORDER");
  return text == nullptr || *text == '\0' ? Order{} : Order::parse(text);
}

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
  throw std::runtime_error(std::string("kernel ") + name + ": " + why);
}

inline void check_shape(const char* name, const LaunchShape& shape) {
  const int most = pretended.shared_bytes;
  const auto say = [](int64_t value) { return std::to_string(value); };
  if (shape.blocks < 1 || shape.blocks > 0x7fffffff) refuse(name, say(shape.blocks) + " blocks");
  if (shape.rows < 1 || shape.rows > 0xffff) refuse(name, say(shape.rows) + " rows of blocks");
  if (shape.threads < kLanes || shape.threads > kLanes * kMostWarps || shape.threads % kLanes != 0) {
    refuse(name, say(shape.threads) + " threads, which is not 1 to 32 warps of 32");
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > most) {
    refuse(name, say(shape.shared_bytes) + " bytes of shared memory, where a block has " + say(most));
  }
}

}  // namespace emulator

inline const Properties& properties() { return emulator::pretended; }

// For tests: what properties() tells from now on, and the order of threads ("" for the environment's).
inline void set_properties(const Properties& p) { emulator::pretended = p; }
inline void set_order(const std::string& order) {
  emulator::chosen_order = order.empty() ? std::nullopt : std::optional(emulator::Order::parse(order));
}

inline std::string launches() {
  std::string text;
  for (const std::string& name : emulator::launched()) text += name + "\n";
  emulator::launched().clear();
  return text;
}

// Memory that kernels launched by this thread may touch while the object lives; every other access is an error.
class AllowedMemory {
 public:
  AllowedMemory() = default;
  AllowedMemory(const AllowedMemory&) = delete;
  AllowedMemory& operator=(const AllowedMemory&) = delete;
  ~AllowedMemory() { emulator::Machine::mine().disallow(this); }

  void add(const void* p, int64_t bytes, bool written, const char* what) {
    emulator::Machine::mine().allow(this, p, bytes, written, what);
  }
};

namespace emulator {

template <typename Args>
void run(const char* name, void (*kernel)(Args), const LaunchShape& shape, bool overlap, bool cooperative,
         const Args& args) {
  check_shape(name, shape);
  constexpr size_t kMostNames = 512;
  if (launched().size() == kMostNames) launched().pop_front();
  launched().emplace_back(name);
  const Machine::Invoke invoke = [](void (*k)(), const void* a) {
    reinterpret_cast<void (*)(Args)>(k)(*static_cast<const Args*>(a));
  };
  Machine::mine().run(name, invoke, reinterpret_cast<void (*)()>(kernel), &args, shape.blocks, shape.rows,
                      shape.threads, shape.shared_bytes, overlap, cooperative, order());
}

}  // namespace emulator

template <typename Args>
void launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, Stream, bool overlap, const Args& args) {
  emulator::run(name, kernel, shape, overlap, false, args);
}

}  // namespace esr::device
