// What happens to a convolution's float32 results before they are stored.
#pragma once

#include "../common/activation.h"
#include "device.h"

namespace esr::cuda {

using device::fast_divide;
using device::fast_exp;

ESR_DEVICE float sigmoid(float h) { return fast_divide(1.0f, 1.0f + fast_exp(-h)); }

template <int Count>
ESR_DEVICE void activate(float (&h)[Count], Activation activation, float slope) {
  constexpr float kRootHalf = 0.7071067811865476f, kRootTwoOverPi = 0.7978845608028654f;
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = h[i] < 0.0f ? 0.0f : h[i];  // NaN stays
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = h[i] < 0.0f ? h[i] * slope : h[i];
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = fast_divide(h[i], 1.0f + fast_exp(-h[i]));
      break;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = 0.5f * h[i] * (1.0f + erff(h[i] * kRootHalf));
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        h[i] = 0.5f * h[i] * (1.0f + tanhf(kRootTwoOverPi * (h[i] + 0.044715f * h[i] * h[i] * h[i])));
      }
      break;
  }
}

template <int Count>
ESR_DEVICE void finish(float (&h)[Count], const float (&residual)[Count], Activation activation, float slope,
                       ResidualMode mode) {
  switch (mode) {
    case ResidualMode::kNone:
      activate(h, activation, slope);
      break;
    case ResidualMode::kPre:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] += residual[i];
      activate(h, activation, slope);
      break;
    case ResidualMode::kPost:
      activate(h, activation, slope);
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] += residual[i];
      break;
    case ResidualMode::kAttention:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = (h[i] + residual[i]) * (sigmoid(h[i]) - 0.5f);
      break;
    case ResidualMode::kGate:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = residual[i] * sigmoid(h[i]);
      break;
  }
}

}  // namespace esr::cuda
