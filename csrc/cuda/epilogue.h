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
  if (mode == ResidualMode::kPre) {
#pragma unroll
    for (int i = 0; i < Count; ++i) h[i] += residual[i];
  }
  switch (mode) {
    default:
      activate(h, activation, slope);  // once for all modes: it is most of a kernel's code
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
  if (mode == ResidualMode::kPost) {
#pragma unroll
    for (int i = 0; i < Count; ++i) h[i] += residual[i];
  }
}

// g times the activation's derivative at h, in place of h.
template <int Count>
ESR_DEVICE void differentiate(float (&h)[Count], const float (&g)[Count], Activation activation, float slope) {
  constexpr float kRootHalf = 0.7071067811865476f, kRootTwoOverPi = 0.7978845608028654f;
  constexpr float kOneOverRootTwoPi = 0.3989422804014327f, kCubic = 0.044715f;
  switch (activation) {
    case Activation::kNone:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = g[i];
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = h[i] <= 0.0f ? 0.0f : g[i];  // NaN lets g through, as in PyTorch
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (int i = 0; i < Count; ++i) h[i] = h[i] > 0.0f ? g[i] : g[i] * slope;
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float s = sigmoid(h[i]);
        h[i] = g[i] * s * (1.0f + h[i] * (1.0f - s));
      }
      break;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float density = kOneOverRootTwoPi * fast_exp(-0.5f * h[i] * h[i]);
        h[i] = g[i] * (0.5f * (1.0f + erff(h[i] * kRootHalf)) + h[i] * density);
      }
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float square = h[i] * h[i];
        const float t = tanhf(kRootTwoOverPi * h[i] * (1.0f + kCubic * square));
        const float inner = kRootTwoOverPi * (1.0f + 3.0f * kCubic * square);
        h[i] = g[i] * 0.5f * (1.0f + t + h[i] * (1.0f - t * t) * inner);
      }
      break;
  }
}

// The adjoint of `finish`: h becomes the gradient to h where g is the result's, and the residual the one to itself.
template <int Count>
ESR_DEVICE void finish_backward(float (&h)[Count], float (&residual)[Count], const float (&g)[Count],
                                Activation activation, float slope, ResidualMode mode) {
  if (mode == ResidualMode::kPre) {
#pragma unroll
    for (int i = 0; i < Count; ++i) h[i] += residual[i];
  }
  switch (mode) {
    default:
      differentiate(h, g, activation, slope);
#pragma unroll
      for (int i = 0; i < Count; ++i) residual[i] = mode == ResidualMode::kPre ? h[i] : g[i];
      break;
    case ResidualMode::kAttention:
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float s = sigmoid(h[i]), direct = g[i] * (s - 0.5f);
        h[i] = direct + g[i] * (h[i] + residual[i]) * s * (1.0f - s);
        residual[i] = direct;
      }
      break;
    case ResidualMode::kGate:
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float s = sigmoid(h[i]);
        h[i] = g[i] * residual[i] * s * (1.0f - s);
        residual[i] = g[i] * s;
      }
      break;
  }
}

}  // namespace esr::cuda
