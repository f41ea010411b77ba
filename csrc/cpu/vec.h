// A vector of floats. Included once per path_*.cpp, inside its target region and its namespace, so that nothing
// compiled for a newer instruction set can be picked by the linker for an older one. No standard header may be included
// from here.
//
// Every operation rounds the same way on all lanes and whatever surrounds it: products that feed a sum are written as
// fma, so that no compiler may contract one copy of an expression and not another.

#if defined(ESR_PATH_AVX512)

constexpr int kLanes = 16;
// Pixels computed at once for a block of 1, 2 and 3 vectors of channels: 32 registers.
constexpr int kPixels1 = 12, kPixels2 = 12, kPixels3 = 8;
// Channels of two vectors of pixels each: 24 sums.
constexpr int kPlanarRows = 12;
// Channels of a gradient and of an input, of one vector of pixels each: 24 sums.
constexpr int kProductRows = 6, kProductColumns = 4;
// States of a scan that are advanced together, with three registers each for their decay.
constexpr int kScanStates = 4;
using Vec = __m512;

ESR_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
ESR_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
ESR_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
ESR_INLINE Vec zero() { return _mm512_setzero_ps(); }
ESR_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
ESR_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
ESR_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
ESR_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
ESR_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
ESR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
ESR_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
// When one operand is NaN these return b.
ESR_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// Not _mm512_max_ps, of whose header GCC 12 warns in some loops.
ESR_INLINE Vec vmax(Vec a, Vec b) { return _mm512_maskz_max_ps(static_cast<__mmask16>(0xffff), a, b); }
ESR_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
ESR_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
}
ESR_INLINE Vec select_nan(Vec x, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), b, a);
}
ESR_INLINE Vec shift_to_exponent(Vec a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
ESR_INLINE Vec load_partial(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
ESR_INLINE void store_partial(float* p, Vec v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
}
// The first n lanes, zeros in the others.
ESR_INLINE Vec keep_lanes(Vec v, int n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), v); }
ESR_INLINE Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ESR_INLINE void store_half(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
ESR_INLINE Vec load_bfloat(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
ESR_INLINE void store_bfloat(uint16_t* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
// r[i][j] <- r[j][i]
ESR_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // Now 128-bit lane k of r[4 g + j] holds column 4 k + j of rows 4 g .. 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const Vec lo01 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), hi01 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const Vec lo13 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), hi13 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(lo01, hi01, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(lo01, hi01, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(lo13, hi13, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(lo13, hi13, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

#elif defined(ESR_PATH_AVX2)

constexpr int kLanes = 8;
// 16 registers: 12 accumulators, the weights, one broadcast pixel.
constexpr int kPixels1 = 8, kPixels2 = 6, kPixels3 = 4;
constexpr int kPlanarRows = 6;
constexpr int kProductRows = 4, kProductColumns = 3;
constexpr int kScanStates = 2;
using Vec = __m256;

ESR_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
ESR_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
ESR_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
ESR_INLINE Vec zero() { return _mm256_setzero_ps(); }
ESR_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
ESR_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
ESR_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
ESR_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
ESR_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
ESR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
ESR_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
// When one operand is NaN these return b.
ESR_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
ESR_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
ESR_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
ESR_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}
ESR_INLINE Vec select_nan(Vec x, Vec a, Vec b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
ESR_INLINE Vec shift_to_exponent(Vec a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
ESR_INLINE __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
ESR_INLINE Vec load_partial(const float* p, int n) { return _mm256_maskload_ps(p, lane_mask(n)); }
ESR_INLINE void store_partial(float* p, Vec v, int n) { _mm256_maskstore_ps(p, lane_mask(n), v); }
// The first n lanes, zeros in the others.
ESR_INLINE Vec keep_lanes(Vec v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(lane_mask(n))); }
ESR_INLINE Vec load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ESR_INLINE void store_half(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
ESR_INLINE Vec load_bfloat(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
ESR_INLINE void store_bfloat(uint16_t* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
// r[i][j] <- r[j][i]
ESR_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#else  // plain: the compiler's vector extension

constexpr int kLanes = 16;
// 16 floats are four 128-bit registers: 2 x 2 fills the 32 registers of AArch64.
constexpr int kPixels1 = 4, kPixels2 = 2, kPixels3 = 1;
constexpr int kPlanarRows = 2;
constexpr int kProductRows = 2, kProductColumns = 2;
constexpr int kScanStates = 2;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));

ESR_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
ESR_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
ESR_INLINE Vec zero() { return Vec{}; }
ESR_INLINE Vec set1(float x) { return Vec{} + x; }
ESR_INLINE Vec add(Vec a, Vec b) { return a + b; }
ESR_INLINE Vec sub(Vec a, Vec b) { return a - b; }
ESR_INLINE Vec mul(Vec a, Vec b) { return a * b; }
ESR_INLINE Vec div(Vec a, Vec b) { return a / b; }
ESR_INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
ESR_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
ESR_INLINE Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
ESR_INLINE Vec select(IntVec mask, Vec a, Vec b) { return (Vec)((mask & (IntVec)a) | (~mask & (IntVec)b)); }
// When one operand is NaN these return b.
ESR_INLINE Vec vmin(Vec a, Vec b) { return select(a < b, a, b); }
ESR_INLINE Vec vmax(Vec a, Vec b) { return select(a > b, a, b); }
ESR_INLINE Vec abs(Vec a) { return (Vec)((IntVec)a & (IntVec{} + 0x7fffffff)); }
ESR_INLINE Vec select_negative(Vec x, Vec a, Vec b) { return select(x < zero(), a, b); }
ESR_INLINE Vec select_nan(Vec x, Vec a, Vec b) { return select(x != x, a, b); }
ESR_INLINE Vec shift_to_exponent(Vec a) { return (Vec)((IntVec)a << 23); }
ESR_INLINE Vec load_partial(const float* p, int n) {
  Vec v{};
  __builtin_memcpy(&v, p, sizeof(float) * static_cast<size_t>(n));
  return v;
}
ESR_INLINE void store_partial(float* p, Vec v, int n) {
  __builtin_memcpy(p, &v, sizeof(float) * static_cast<size_t>(n));
}
// The first n lanes, zeros in the others.
ESR_INLINE Vec keep_lanes(Vec v, int n) {
  for (int i = n; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}
ESR_INLINE Vec load_half(const uint16_t* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
}
ESR_INLINE void store_half(uint16_t* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
}
ESR_INLINE Vec load_bfloat(const uint16_t* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = bfloat_to_float(p[i]);
  return v;
}
ESR_INLINE void store_bfloat(uint16_t* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bfloat(v[i]);
}
// r[i][j] <- r[j][i]
ESR_INLINE void transpose(Vec (&r)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
  }
}

#endif
