// The kernels in the compiler's vector extension, for every other CPU: 16 lanes.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"

#define ESR_PATH plain
#include "path_kernels.h"

namespace esr {

const Kernels* kernels_plain() {
  static constexpr Kernels kernels = plain::make_kernels("plain");
  return &kernels;
}

}  // namespace esr
