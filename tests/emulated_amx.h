// What csrc/cpu/bfloat_conv.h uses of AVX-512 and AMX beyond emulated_avx512.h, for tests on a CPU without: element by
// element, after Intel's Intrinsics Guide. Included by csrc/cpu/path_amx.cpp. Denormal numbers, which the instructions
// take for zeros, are kept, and the reciprocal is exact.

#include "emulated_avx512.h"

namespace esr {
namespace emulated {

template <typename F>
ESR_EMULATED Floats each(Floats a, Floats b, const F& f) {
  alignas(32) float x[16], y[16];
  storeu(x, a);
  storeu(y, b);
  for (int i = 0; i < 16; ++i) x[i] = f(x[i], y[i]);
  return loadu(x);
}
template <int kRounding>
ESR_EMULATED Floats reduce(Floats a) {
  static_assert((kRounding & 3) == _MM_FROUND_TO_NEG_INF);
  return each(a, a, [](float x, float) { return std::isinf(x) ? 0.0f : x - std::floor(x); });
}
ESR_EMULATED Floats scalef(Floats a, Floats b) {
  return each(a, b, [](float x, float y) { return x * std::exp2(std::floor(y)); });
}
ESR_EMULATED Floats reciprocal(Floats a) {
  return each(a, a, [](float x, float) { return 1.0f / x; });
}
// The lower 16 elements come from `low`.
ESR_EMULATED Integers to_bfloat(unsigned mask, Floats high, Floats low) {
  alignas(32) float values[32];
  alignas(32) uint16_t bits[32];
  storeu(values, low);
  storeu(values + 16, high);
  for (int i = 0; i < 32; ++i) bits[i] = (mask >> i & 1) != 0 ? float_to_bfloat(values[i]) : uint16_t{0};
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(bits)),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(bits + 16))};
}
ESR_EMULATED void storeu_bits(void* p, Integers v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v.low);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, v.high);
}

struct Tile {
  unsigned char rows[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void load_configuration(const void* p) {
  const unsigned char* bytes = static_cast<const unsigned char*>(p);
  configured = bytes[0] == 1;
  for (int i = 0; i < 8; ++i) configured = configured && bytes[16 + 2 * i] == 64 && bytes[48 + i] == 16;
}
inline void release_tiles() { configured = false; }
inline Tile& tile(int i) {
  if (!configured) __builtin_trap();
  return tiles[i];
}
inline void load_tile(int i, const void* p, long stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(tile(i).rows[r], static_cast<const char*>(p) + r * stride, 64);
}
inline void store_tile(int i, void* p, long stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(p) + r * stride, tile(i).rows[r], 64);
}
inline void multiply_tiles(int sums, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    float sum[16];
    uint16_t x[32];
    __builtin_memcpy(sum, tile(sums).rows[m], 64);
    __builtin_memcpy(x, tile(a).rows[m], 64);
    for (int k = 0; k < 16; ++k) {
      uint16_t y[32];
      __builtin_memcpy(y, tile(b).rows[k], 64);
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 2; ++i) {
          sum[n] = std::fma(bfloat_to_float(x[2 * k + i]), bfloat_to_float(y[2 * n + i]), sum[n]);
        }
      }
    }
    __builtin_memcpy(tile(sums).rows[m], sum, 64);
  }
}

}  // namespace emulated
}  // namespace esr

// clang-format off
#undef _mm512_reduce_ps
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define __mmask32 unsigned
#define _mm512_reduce_ps(a, rounding) ::esr::emulated::reduce<(rounding)>(a)
#define _mm512_scalef_ps ::esr::emulated::scalef
#define _mm512_rcp14_ps ::esr::emulated::reciprocal
#define _mm512_maskz_cvtne2ps_pbh ::esr::emulated::to_bfloat
#define _mm512_storeu_si512 ::esr::emulated::storeu_bits
#define _tile_loadconfig ::esr::emulated::load_configuration
#define _tile_release ::esr::emulated::release_tiles
#define _tile_loadd ::esr::emulated::load_tile
#define _tile_stored ::esr::emulated::store_tile
#define _tile_dpbf16ps ::esr::emulated::multiply_tiles
