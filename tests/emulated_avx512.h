// The AVX-512 intrinsics that csrc/cpu/vec.h uses, in AVX2, after their description in Intel's Intrinsics Guide: with
// them the kernels for AVX-512 are tested on a CPU without (tests/sanitize.py). Included by csrc/cpu/path_avx512.cpp
// inside its target region, after <immintrin.h>, whose names it takes over.

namespace esr {

// In a namespace of their own: calls with these arguments must not find the functions below.
namespace emulated_registers {
struct Floats {
  __m256 low, high;
};
struct Integers {
  __m256i low, high;
};
}  // namespace emulated_registers

namespace emulated {

#define ESR_EMULATED static inline __attribute__((always_inline))

using emulated_registers::Floats;
using emulated_registers::Integers;
using Mask = unsigned short;

ESR_EMULATED __m256i lanes(unsigned mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
}
ESR_EMULATED __m256 float_lanes(unsigned mask) { return _mm256_castsi256_ps(lanes(mask)); }

ESR_EMULATED Floats loadu(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ESR_EMULATED void storeu(float* p, Floats v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
// Lanes without their bit in the mask are not touched in memory.
ESR_EMULATED Floats maskz_loadu(Mask k, const float* p) {
  return {_mm256_maskload_ps(p, lanes(k)), _mm256_maskload_ps(p + 8, lanes(k >> 8))};
}
ESR_EMULATED void mask_storeu(float* p, Mask k, Floats v) {
  _mm256_maskstore_ps(p, lanes(k), v.low);
  _mm256_maskstore_ps(p + 8, lanes(k >> 8), v.high);
}
ESR_EMULATED Floats maskz_mov(Mask k, Floats v) {
  return {_mm256_and_ps(v.low, float_lanes(k)), _mm256_and_ps(v.high, float_lanes(k >> 8))};
}
ESR_EMULATED Floats mask_blend(Mask k, Floats a, Floats b) {
  return {_mm256_blendv_ps(a.low, b.low, float_lanes(k)), _mm256_blendv_ps(a.high, b.high, float_lanes(k >> 8))};
}
ESR_EMULATED Integers mask_blend(Mask k, Integers a, Integers b) {
  return {_mm256_blendv_epi8(a.low, b.low, lanes(k)), _mm256_blendv_epi8(a.high, b.high, lanes(k >> 8))};
}
ESR_EMULATED Floats set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ESR_EMULATED Integers set1(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

#define ESR_EMULATED_BINARY(name, type, intrinsic) \
  ESR_EMULATED type name(type a, type b) { return {intrinsic(a.low, b.low), intrinsic(a.high, b.high)}; }
ESR_EMULATED_BINARY(add, Floats, _mm256_add_ps)
ESR_EMULATED_BINARY(sub, Floats, _mm256_sub_ps)
ESR_EMULATED_BINARY(mul, Floats, _mm256_mul_ps)
ESR_EMULATED_BINARY(div, Floats, _mm256_div_ps)
ESR_EMULATED_BINARY(min, Floats, _mm256_min_ps)
ESR_EMULATED_BINARY(max, Floats, _mm256_max_ps)
ESR_EMULATED_BINARY(unpacklo, Floats, _mm256_unpacklo_ps)
ESR_EMULATED_BINARY(unpackhi, Floats, _mm256_unpackhi_ps)
ESR_EMULATED_BINARY(add, Integers, _mm256_add_epi32)
ESR_EMULATED_BINARY(bits_and, Integers, _mm256_and_si256)
#undef ESR_EMULATED_BINARY

ESR_EMULATED Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
ESR_EMULATED Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
ESR_EMULATED Floats fmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
ESR_EMULATED Floats fnmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
template <int kPredicate>
ESR_EMULATED Mask cmp(Floats a, Floats b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, kPredicate));
  return static_cast<Mask>(low | _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, kPredicate)) << 8);
}
ESR_EMULATED Floats as_floats(Integers a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
ESR_EMULATED Integers as_integers(Floats a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
template <int kCount>
ESR_EMULATED Integers slli(Integers a) {
  return {_mm256_slli_epi32(a.low, kCount), _mm256_slli_epi32(a.high, kCount)};
}
template <int kCount>
ESR_EMULATED Integers srli(Integers a) {
  return {_mm256_srli_epi32(a.low, kCount), _mm256_srli_epi32(a.high, kCount)};
}
ESR_EMULATED Floats cvtph(__m256i halves) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
template <int kRounding>
ESR_EMULATED __m256i cvtps(Floats v) {
  // The older instruction always suppresses exceptions and knows no bit that asks for it.
  constexpr int kMode = kRounding & ~_MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(v.high, kMode), _mm256_cvtps_ph(v.low, kMode));
}
ESR_EMULATED Integers cvtepu16(__m256i words) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1))};
}
// The lower half of each.
ESR_EMULATED __m256i cvtepi32(Integers v) {
  const __m256i word = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(v.low, word), _mm256_and_si256(v.high, word));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
template <int kSelection>
ESR_EMULATED Floats shuffle(Floats a, Floats b) {
  return {_mm256_shuffle_ps(a.low, b.low, kSelection), _mm256_shuffle_ps(a.high, b.high, kSelection)};
}
template <int kQuarter>
ESR_EMULATED __m128 quarter(Floats v) {
  return _mm256_extractf128_ps(kQuarter < 2 ? v.low : v.high, kQuarter % 2);
}
template <int kSelection>
ESR_EMULATED Floats shuffle_quarters(Floats a, Floats b) {
  return {_mm256_set_m128(quarter<(kSelection >> 2) & 3>(a), quarter<kSelection & 3>(a)),
          _mm256_set_m128(quarter<(kSelection >> 6) & 3>(b), quarter<(kSelection >> 4) & 3>(b))};
}

}  // namespace emulated
}  // namespace esr

// clang-format off
#undef _mm512_cmp_ps_mask
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_cvtps_ph
#undef _mm512_shuffle_ps
#undef _mm512_shuffle_f32x4
#define __m512 ::esr::emulated::Floats
#define __m512i ::esr::emulated::Integers
#define __mmask16 ::esr::emulated::Mask
#define _mm512_loadu_ps ::esr::emulated::loadu
#define _mm512_storeu_ps ::esr::emulated::storeu
#define _mm512_maskz_loadu_ps ::esr::emulated::maskz_loadu
#define _mm512_mask_storeu_ps ::esr::emulated::mask_storeu
#define _mm512_maskz_mov_ps ::esr::emulated::maskz_mov
#define _mm512_mask_blend_ps ::esr::emulated::mask_blend
#define _mm512_mask_blend_epi32 ::esr::emulated::mask_blend
#define _mm512_set1_ps(x) ::esr::emulated::set1(static_cast<float>(x))
#define _mm512_set1_epi32(x) ::esr::emulated::set1(static_cast<int>(x))
#define _mm512_setzero_ps() ::esr::emulated::set1(0.0f)
#define _mm512_add_ps ::esr::emulated::add
#define _mm512_sub_ps ::esr::emulated::sub
#define _mm512_mul_ps ::esr::emulated::mul
#define _mm512_div_ps ::esr::emulated::div
#define _mm512_min_ps ::esr::emulated::min
#define _mm512_maskz_max_ps(mask, a, b) ::esr::emulated::max(a, b)  // all lanes
#define _mm512_unpacklo_ps ::esr::emulated::unpacklo
#define _mm512_unpackhi_ps ::esr::emulated::unpackhi
#define _mm512_add_epi32 ::esr::emulated::add
#define _mm512_and_si512 ::esr::emulated::bits_and
#define _mm512_sqrt_ps ::esr::emulated::sqrt
#define _mm512_abs_ps ::esr::emulated::abs
#define _mm512_fmadd_ps ::esr::emulated::fmadd
#define _mm512_fnmadd_ps ::esr::emulated::fnmadd
#define _mm512_cmp_ps_mask(a, b, predicate) ::esr::emulated::cmp<predicate>(a, b)
#define _mm512_castsi512_ps ::esr::emulated::as_floats
#define _mm512_castps_si512 ::esr::emulated::as_integers
#define _mm512_slli_epi32(a, count) ::esr::emulated::slli<count>(a)
#define _mm512_srli_epi32(a, count) ::esr::emulated::srli<count>(a)
#define _mm512_cvtph_ps ::esr::emulated::cvtph
#define _mm512_cvtps_ph(v, rounding) ::esr::emulated::cvtps<(rounding)>(v)
#define _mm512_cvtepu16_epi32 ::esr::emulated::cvtepu16
#define _mm512_cvtepi32_epi16 ::esr::emulated::cvtepi32
#define _mm512_shuffle_ps(a, b, selection) ::esr::emulated::shuffle<selection>(a, b)
#define _mm512_shuffle_f32x4(a, b, selection) ::esr::emulated::shuffle_quarters<selection>(a, b)
