// Ways of computing that are off until a measurement shows on which GPUs they pay.
#pragma once

#include <cstdlib>

namespace esr::cuda {

// Whether an environment variable is 1.
inline bool switched_on(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && value[0] == '1' && value[1] == 0;
}

inline constexpr const char* kHalfSumsSwitch = "ESR_KERNELS_CUDA_HALF_SUMS";
inline constexpr const char* kSpabSwitch = "ESR_KERNELS_CUDA_SPAB";
inline constexpr const char* kPersistentSwitch = "ESR_KERNELS_CUDA_PERSISTENT";
// Read when a plan is compiled: weights are packed in another way.
inline constexpr const char* kWinogradSwitch = "ESR_KERNELS_CUDA_WINOGRAD";
inline constexpr const char* kWgmmaSwitch = "ESR_KERNELS_CUDA_WGMMA";

}  // namespace esr::cuda
