// What happens to a convolution's result before it is stored.
#pragma once

#include <cstdint>

namespace esr {

enum class Activation : int32_t { kNone = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kGelu = 4, kGeluTanh = 5 };
inline constexpr int64_t kActivationCount = 6;

// What a layer can do to every element of a map: the activations, under their numbers, and more.
enum class Function : int32_t {
  kNone = 0,
  kRelu = 1,
  kLeakyRelu = 2,  // x * low where x is negative
  kSilu = 3,
  kGelu = 4,
  kGeluTanh = 5,
  kSigmoid = 6,    // high * sigmoid(x)
  kClamp = 7,      // at least low, at most high
  kHardswish = 8,  // x * clamp(x / 6 + 1 / 2, 0, 1)
  kMish = 9,       // x * tanh(log(1 + exp(x)))
  kRsqrt = 10,     // high / max(sqrt(x), low)
};
inline constexpr int64_t kFunctionCount = 11;

// h is the convolution's result. The first three are public, the first two of every operator with a residual; a gate
// ends ESA.
enum class ResidualMode : int32_t {
  kPre = 0,        // act(h + residual)
  kPost = 1,       // act(h) + residual
  kAttention = 2,  // (h + residual) * (sigmoid(h) - 0.5)
  kGate = 3,       // residual * sigmoid(h)
  kNone = 4,       // act(h)
};
inline constexpr int64_t kPublicResidualModeCount = 3;
inline constexpr int64_t kSumModeCount = 2;

}  // namespace esr
