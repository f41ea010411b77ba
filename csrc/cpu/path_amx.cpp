// The kernels for AMX: those for AVX-512, and convolutions of bfloat16 maps. Every header that may define functions
// comes before the target region, as in path_avx512.cpp.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"

#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 13)

#include <immintrin.h>

#if defined(ESR_EMULATED_AVX512)  // for tests on a CPU without
#include <cmath>
#define ESR_TARGET "avx2,fma,f16c"
#else
#define ESR_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16"
#endif

#include "target_region.h"

#if defined(ESR_EMULATED_AVX512)
#include "emulated_amx.h"
#endif

#define ESR_PATH amx
#define ESR_PATH_AVX512
#include "path_core.h"

namespace esr {
namespace ESR_PATH {

#include "bfloat_conv.h"

}  // namespace ESR_PATH
}  // namespace esr

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace esr {

const Kernels* kernels_amx() {
  static const Kernels kernels = [] {
    Kernels result = *kernels_avx512();
    result.name = "amx";
    result.bfloat_conv = amx::bfloat_conv;
    return result;
  }();
  return &kernels;
}

}  // namespace esr

#else

namespace esr {

const Kernels* kernels_amx() { return nullptr; }

}  // namespace esr

#endif
