// The primitives of csrc/cuda/device.h on the CPU, every one checked. A last argument `site` is where the caller
// stands.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/half.h"
#include "machine.h"

#define ESR_DEVICE inline
#define ESR_KERNEL(threads, blocks) void
#define ESR_ARGUMENT(type) const type

namespace esr::device {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};

namespace emulator {
inline Machine& machine() { return *Machine::current(); }
}  // namespace emulator

// ---- where a thread is ------------------------------------------------------------------------------------------

inline int thread_index() { return emulator::machine().thread; }
inline int thread_count() { return emulator::machine().threads; }
inline int64_t block_index() { return emulator::machine().block; }
inline int block_row() { return emulator::machine().row; }
inline int64_t grid_size() { return emulator::machine().blocks; }

// ---- synchronisation --------------------------------------------------------------------------------------------

inline void sync_block(emulator::Site site = emulator::Site::current()) { emulator::machine().sync_block(site); }
inline void sync_warp(emulator::Site site = emulator::Site::current()) { emulator::machine().sync_warp(site); }

inline void wait_for_previous_grid() { emulator::machine().wait_for_previous_grid(); }
inline void allow_next_grid() {}

// ---- memory -----------------------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return emulator::machine().shared; }

template <typename T>
constexpr bool kAccessible = sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

template <typename T>
inline T load_shared(const void* p, emulator::Site site = emulator::Site::current()) {
  static_assert(kAccessible<T>);
  T value;
  std::memcpy(&value, emulator::machine().read_shared<sizeof(T), false>(p, site), sizeof(T));
  return value;
}
template <typename T>
inline void store_shared(void* p, T value, emulator::Site site = emulator::Site::current()) {
  static_assert(kAccessible<T>);
  std::memcpy(emulator::machine().write_shared<sizeof(T)>(p, site), &value, sizeof(T));
}
template <typename T>
inline T load_global(const void* p, emulator::Site site = emulator::Site::current()) {
  static_assert(kAccessible<T>);
  emulator::machine().check_global<sizeof(T), false>(p, site);
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}
template <typename T>
inline void store_global(void* p, T value, emulator::Site site = emulator::Site::current()) {
  static_assert(kAccessible<T>);
  emulator::machine().check_global<sizeof(T), true>(p, site);
  std::memcpy(p, &value, sizeof(T));
}

template <int Bytes>
inline void copy_async(void* shared, const void* global, bool valid, emulator::Site site = emulator::Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::machine().issue_copy<Bytes>(shared, global, valid, site);
}
inline void commit_copies() { emulator::machine().commit_copies(); }
template <int Groups>
inline void wait_for_copies() {
  emulator::machine().wait_for_copies(Groups);
}

// ---- tensor cores -----------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&r)[4], const void* row, emulator::Site site = emulator::Site::current()) {
  emulator::Machine& machine = emulator::machine();
  emulator::Warp& warp = machine.warp();
  const int lane = machine.lane();
  warp.rows[lane] = machine.read_shared<16, true>(row, site);
  machine.meet(emulator::Wait::kMatrices, true, site, [](emulator::Machine&, emulator::Warp& w) {
    for (int l = 0; l < emulator::kLanes; l++) {
      for (int i = 0; i < 4; i++) std::memcpy(&w.a[l][i], w.rows[8 * i + l / 4] + 4 * (l % 4), 4);
    }
  });
  std::memcpy(r, warp.a[lane], sizeof r);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row,
                                     emulator::Site site = emulator::Site::current()) {
  emulator::Machine& machine = emulator::machine();
  emulator::Warp& warp = machine.warp();
  const int lane = machine.lane();
  warp.rows[lane] = machine.read_shared<16, true>(row, site);
  machine.meet(emulator::Wait::kMatricesTransposed, true, site, [](emulator::Machine&, emulator::Warp& w) {
    for (int l = 0; l < emulator::kLanes; l++) {
      for (int i = 0; i < 4; i++) {
        uint16_t low, high;
        std::memcpy(&low, w.rows[8 * i + 2 * (l % 4)] + 2 * (l / 4), 2);
        std::memcpy(&high, w.rows[8 * i + 2 * (l % 4) + 1] + 2 * (l / 4), 2);
        w.a[l][i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
  std::memcpy(r, warp.a[lane], sizeof r);
}

struct tf32 {};

namespace emulator {

// The value of one 16-bit operand.
template <typename T>
inline float operand(uint16_t bits) {
  if constexpr (std::is_same_v<T, float16>) {
    return half_to_float(bits);
  } else {
    return bfloat_to_float(bits);
  }
}

// d += a b for [16, K] x [K, 8]; the products are exact in float32.
template <int K>
inline void multiply(Warp& warp, const float (&a)[16][K], const float (&b)[K][8]) {
  using Four = float __attribute__((vector_size(16)));
  for (int row = 0; row < 16; row++) {
    float (*lanes)[4] = &warp.d[4 * (row % 8)];
    const int i = row / 8 * 2;
    Four low = {lanes[0][i], lanes[0][i + 1], lanes[1][i], lanes[1][i + 1]};
    Four high = {lanes[2][i], lanes[2][i + 1], lanes[3][i], lanes[3][i + 1]};
    for (int k = 0; k < K; k++) {
      Four left, right;
      std::memcpy(&left, &b[k][0], sizeof left);
      std::memcpy(&right, &b[k][4], sizeof right);
      low += a[row][k] * left;
      high += a[row][k] * right;
    }
    for (int n = 0; n < 4; n++) {
      lanes[n / 2][i + n % 2] = low[n];
      lanes[2 + n / 2][i + n % 2] = high[n];
    }
  }
}

template <typename T>
[[gnu::noinline]] void multiply_halves(Warp& warp) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kLanes; l++) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) {
      const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
      a[row][column] = operand<T>(static_cast<uint16_t>(warp.a[l][i]));
      a[row][column + 1] = operand<T>(static_cast<uint16_t>(warp.a[l][i] >> 16));
    }
    for (int i = 0; i < 2; i++) {
      const int row = 2 * t + 8 * i;
      b[row][g] = operand<T>(static_cast<uint16_t>(warp.b[l][i]));
      b[row + 1][g] = operand<T>(static_cast<uint16_t>(warp.b[l][i] >> 16));
    }
  }
  multiply<16>(warp, a, b);
}

[[gnu::noinline]] inline void multiply_tf32(Warp& warp) {
  constexpr uint32_t kKept = 0xffffe000u;
  float a[16][8], b[8][8];
  for (int l = 0; l < kLanes; l++) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = esr::bits_float(warp.a[l][i] & kKept);
    for (int i = 0; i < 2; i++) b[t + 4 * i][g] = esr::bits_float(warp.b[l][i] & kKept);
  }
  multiply<8>(warp, a, b);
}

}  // namespace emulator

template <typename T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         emulator::Site site = emulator::Site::current()) {
  constexpr bool kFloat16 = std::is_same_v<T, float16>, kBfloat16 = std::is_same_v<T, bfloat16>;
  static_assert(kFloat16 || kBfloat16 || std::is_same_v<T, tf32>);
  constexpr emulator::Wait kWait = kFloat16    ? emulator::Wait::kMultiplyFloat16
                                   : kBfloat16 ? emulator::Wait::kMultiplyBfloat16
                                               : emulator::Wait::kMultiplyTf32;
  emulator::Machine& machine = emulator::machine();
  emulator::Warp& warp = machine.warp();
  const int lane = machine.lane();
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.d[lane], d, sizeof d);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  machine.meet(kWait, true, site, [](emulator::Machine&, emulator::Warp& w) {
    if constexpr (kFloat16 || kBfloat16) {
      emulator::multiply_halves<T>(w);
    } else {
      emulator::multiply_tf32(w);
    }
  });
  std::memcpy(d, warp.d[lane], sizeof d);
}

// ---- numbers ----------------------------------------------------------------------------------------------------

inline float to_float(float v) { return v; }
inline float to_float(float16 v) { return half_to_float(v.bits); }
inline float to_float(bfloat16 v) { return bfloat_to_float(v.bits); }

template <typename T>
inline T from_float(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, float16>) {
    return {float_to_half(v)};
  } else {
    static_assert(std::is_same_v<T, bfloat16>);
    return {float_to_bfloat(v)};
  }
}

template <typename T>
inline uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
inline void unpack_pair(uint32_t bits, float& low, float& high) {
  T pair[2];
  std::memcpy(pair, &bits, sizeof bits);
  low = to_float(pair[0]), high = to_float(pair[1]);
}

// Rounded twice, which is as good as once: float32 has more than twice a half's bits.
template <typename T>
inline uint32_t add_pairs(uint32_t a, uint32_t b) {
  static_assert(std::is_same_v<T, float16>);
  float a0, a1, b0, b1;
  unpack_pair<T>(a, a0, a1);
  unpack_pair<T>(b, b0, b1);
  return pack_pair<T>(a0 + b0, a1 + b1);
}
template <typename T>
inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  static_assert(std::is_same_v<T, float16>);
  float a0, a1, b0, b1;
  unpack_pair<T>(a, a0, a1);
  unpack_pair<T>(b, b0, b1);
  return pack_pair<T>(a0 - b0, a1 - b1);
}

inline uint32_t float_bits(float v) { return esr::float_bits(v); }
inline float bits_float(uint32_t v) { return esr::bits_float(v); }

inline uint32_t round_tf32(float v) {
  const uint32_t bits = esr::float_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits + 0x1000u) & 0xffffe000u;
}

// __expf multiplies by log2(e) first, whose rounding grows with |v|.
inline float fast_exp(float v) { return std::exp2(v * 1.44269504f); }
// __fdividef is zero for divisors beyond 2^126, and NaN for an infinite dividend over one of them.
inline float fast_divide(float a, float b) {
  if (std::fabs(b) > 0x1p126f && !std::isinf(b)) return a * 0.0f;
  return a / b;
}

inline float shuffle_xor(float v, int mask, emulator::Site site = emulator::Site::current()) {
  emulator::Machine& machine = emulator::machine();
  emulator::Warp& warp = machine.warp();
  const int lane = machine.lane();
  if (mask < 0 || mask >= emulator::kLanes) machine.fail(site, "shuffle_xor with a mask of %d", mask);
  warp.values[lane] = v;
  warp.masks[lane] = mask;
  machine.meet(emulator::Wait::kShuffle, false, site, [](emulator::Machine&, emulator::Warp& w) {
    float moved[emulator::kLanes];
    for (int l = 0; l < emulator::kLanes; l++) moved[l] = w.values[l ^ w.masks[l]];
    std::memcpy(w.values, moved, sizeof moved);
  });
  return warp.values[lane];
}

// Summed in float32 and rounded once, which the hardware does not promise.
inline void multiply_add_half(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              emulator::Site site = emulator::Site::current()) {
  float sums[4];
  unpack_pair<float16>(d[0], sums[0], sums[1]);
  unpack_pair<float16>(d[1], sums[2], sums[3]);
  multiply_add<float16>(sums, a, b0, b1, site);
  d[0] = pack_pair<float16>(sums[0], sums[1]);
  d[1] = pack_pair<float16>(sums[2], sums[3]);
}

}  // namespace esr::device
