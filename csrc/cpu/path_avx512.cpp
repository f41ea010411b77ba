// The kernels for AVX512: 16 lanes, 32 registers. Every header that may define functions comes before the target
// region: an inline function of theirs compiled in it could replace, at link time, the copy that older CPUs run.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>

#if defined(ESR_EMULATED_AVX512)  // for tests on a CPU without
#define ESR_TARGET "avx2,fma,f16c"
#else
#define ESR_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#endif

#include "target_region.h"

#if defined(ESR_EMULATED_AVX512)
#include "emulated_avx512.h"
#endif

#define ESR_PATH avx512
#define ESR_PATH_AVX512
#include "path_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace esr {

const Kernels* kernels_avx512() {
  static constexpr Kernels kernels = avx512::make_kernels("avx512");
  return &kernels;
}

}  // namespace esr

#else

namespace esr {

const Kernels* kernels_avx512() { return nullptr; }

}  // namespace esr

#endif
