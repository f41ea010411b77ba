// The kernels for AVX2: 8 lanes, 16 registers. Every header that may define functions comes before the target region:
// an inline function of theirs compiled in it could replace, at link time, the copy that older CPUs run.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>

#define ESR_TARGET "avx2,fma,f16c"
#include "target_region.h"

#define ESR_PATH avx2
#define ESR_PATH_AVX2
#include "path_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace esr {

const Kernels* kernels_avx2() {
  static constexpr Kernels kernels = avx2::make_kernels("avx2");
  return &kernels;
}

}  // namespace esr

#else

namespace esr {

const Kernels* kernels_avx2() { return nullptr; }

}  // namespace esr

#endif
