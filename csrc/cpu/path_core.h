// What the kernels of every instruction set are written with. A path_*.cpp defines ESR_PATH, includes every standard
// header first, opens its target region and then includes this file, by itself or through path_kernels.h.

#define ESR_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define ESR_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ESR_UNROLL _Pragma("GCC unroll 16")
#endif

namespace esr {
namespace ESR_PATH {

template <typename T, T kV>
struct Constant {
  static constexpr T kValue = kV;
};

// Each of these uses the ones before it.
// clang-format off
#include "vec.h"
#include "math.h"
#include "epilogue.h"
// clang-format on

}  // namespace ESR_PATH
}  // namespace esr
