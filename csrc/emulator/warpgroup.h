// The primitives of csrc/cuda/warpgroup.h on the CPU, every one checked. A last argument `site` is where the caller
// stands.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.h"

namespace esr::device {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::machine().shared);
}

// ---- barriers ---------------------------------------------------------------------------------------------------

inline void sync_threads(int barrier, int threads, emulator::Site site = emulator::Site::current()) {
  emulator::machine().named_barrier(barrier, threads, true, site);
}
inline void arrive_threads(int barrier, int threads, emulator::Site site = emulator::Site::current()) {
  emulator::machine().named_barrier(barrier, threads, false, site);
}

inline void init_barrier(void* barrier, int arrivals, emulator::Site site = emulator::Site::current()) {
  emulator::machine().init_barrier(barrier, arrivals, site);
}
inline void expect_bytes(void* barrier, int bytes, emulator::Site site = emulator::Site::current()) {
  emulator::machine().expect_bytes(barrier, bytes, site);
}
inline void copy_bulk(void* shared, const void* global, int bytes, void* barrier,
                      emulator::Site site = emulator::Site::current()) {
  emulator::machine().issue_bulk_copy(shared, global, static_cast<uint32_t>(bytes), barrier, site);
}
inline void wait_for_bytes(void* barrier, int parity, emulator::Site site = emulator::Site::current()) {
  emulator::machine().wait_for_bytes(barrier, parity, site);
}

inline void fence_async_proxy() { emulator::machine().fence_async_proxy(); }

// ---- products ---------------------------------------------------------------------------------------------------

namespace emulator {

// What a descriptor says of an operand, in bytes.
struct Operand {
  uint32_t start, leading, stride;

  // 16 bytes: row (or column) `i`, values 8 chunk ...
  uint32_t unit(int i, int chunk) const {
    const uint32_t at = static_cast<uint32_t>(i);
    return start + at / 8 * stride + at % 8 * 16 + static_cast<uint32_t>(chunk) * leading;
  }
};

inline Operand decode(Machine& machine, uint64_t descriptor) {
  constexpr uint64_t kField = 0x3fff, kKnown = kField | kField << 16 | kField << 32;
  if ((descriptor & ~kKnown) != 0) {
    machine.fail(machine.site(), "a matrix descriptor with bits that only swizzled layouts have: %016llx",
                 static_cast<unsigned long long>(descriptor));
  }
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & kField) << 4; };
  return {field(0), field(16), field(32)};
}

// One warp's part of a warpgroup's product: 16 of the 64 rows.
template <typename T>
[[gnu::noinline]] void multiply_async(Machine& machine, Warp& warp, int tiles) {
  const Site site = machine.site();
  if (machine.threads % (4 * kLanes) != 0) machine.fail(site, "a product of a warpgroup in a block without whole ones");
  const Warp::Descriptors given = warp.descriptors[machine.lane()];
  for (const Warp::Descriptors& other : warp.descriptors) {
    if (other.a != given.a || other.b != given.b) machine.fail(site, "lanes of a warp give different descriptors");
  }
  const Operand left = decode(machine, given.a), right = decode(machine, given.b);
  const int first = machine.thread / kLanes % 4 * 16, columns = 8 * tiles;
  float a[16][16], b[16][64], sums[16][64];
  for (int chunk = 0; chunk < 2; chunk++) {
    for (int i = 0; i < 16; i++) {
      const unsigned char* unit = machine.read_for_product(left.unit(first + i, chunk), site);
      for (int k = 0; k < 8; k++) {
        uint16_t bits;
        std::memcpy(&bits, unit + 2 * k, 2);
        a[i][8 * chunk + k] = operand<T>(bits);
      }
    }
    for (int i = 0; i < columns; i++) {
      const unsigned char* unit = machine.read_for_product(right.unit(i, chunk), site);
      for (int k = 0; k < 8; k++) {
        uint16_t bits;
        std::memcpy(&bits, unit + 2 * k, 2);
        b[8 * chunk + k][i] = operand<T>(bits);
      }
    }
  }
  AsyncSums& in_flight = machine.take_sums(warp, 4 * tiles, site);
  // A lane has rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next of every 8.
  const auto each = [&](const auto& function) {
    for (int l = 0; l < kLanes; l++) {
      for (int i = 0; i < 4 * tiles; i++) {
        function(in_flight.values[l][i], sums[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2]);
      }
    }
  };
  each([](float& value, float& sum) { sum = value; });
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < columns; n++) sums[row][n] += a[row][k] * b[k][n];
    }
  }
  each([](float& value, float& sum) { value = sum; });
  warp.products++;
}

}  // namespace emulator

template <typename T, int kN>
inline void multiply_add_async(float (&d)[kN][4], uint64_t a, uint64_t b,
                               emulator::Site site = emulator::Site::current()) {
  constexpr bool kFloat16 = std::is_same_v<T, float16>;
  static_assert(kFloat16 || std::is_same_v<T, bfloat16>);
  static_assert(4 * kN <= emulator::kMostAsyncSums);
  emulator::Machine& machine = emulator::machine();
  machine.warp().descriptors[machine.lane()] = {a, b};
  machine.warp().registers[machine.lane()] = &d[0][0];
  machine.meet(kFloat16 ? emulator::Wait::kMultiplyAsyncFloat16 : emulator::Wait::kMultiplyAsyncBfloat16, true, site,
               [](emulator::Machine& m, emulator::Warp& w) { emulator::multiply_async<T>(m, w, kN); });
}

template <int kM, int kN>
inline void fence_products(float (&)[kM][kN][4], emulator::Site site = emulator::Site::current()) {
  emulator::machine().fence_products(site);
}
inline void commit_products(emulator::Site site = emulator::Site::current()) {
  emulator::machine().commit_products(site);
}
template <int Groups, int kM, int kN>
inline void wait_for_products(float (&)[kM][kN][4], emulator::Site site = emulator::Site::current()) {
  emulator::machine().wait_for_products(Groups, site);
}

// The value of the warp's first lane.
inline int uniform(int value) { return value; }

}  // namespace esr::device
