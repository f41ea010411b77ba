// Resizing without aligned corners, as PyTorch does it.
#pragma once

#include <cstdint>

namespace esr {

enum class Resize : int32_t { kNearest = 0, kBilinear = 1, kBicubic = 2 };
inline constexpr int64_t kResizeCount = 3;
inline constexpr int64_t kBlendModeCount = 2;    // those of a modulate
inline constexpr int64_t kMostModulateMaps = 8;  // of a modulate
inline constexpr int64_t kMostResize = 64;       // upscale factor of a resize

// Of an enlargement by a whole factor: position i * factor + phase of a side reads `count` positions of the input from
// i + first on, each with its weight; positions beyond an end are those at the end.
struct ResizeTaps {
  int first = 0;
  int count = 1;
  float weights[4] = {1.0f, 0.0f, 0.0f, 0.0f};
};

// In quotients of whole numbers, so that the weights are as good as float32 allows for every factor.
inline ResizeTaps resize_taps(Resize mode, int64_t factor, int64_t phase) {
  ResizeTaps taps;
  if (mode == Resize::kNearest) return taps;
  const int64_t twice = 2 * phase + 1 - factor;  // the distance from position i, in halves of a position of the result
  const int low = twice < 0 ? -1 : 0;
  const double t = static_cast<double>(twice - 2 * low * factor) / static_cast<double>(2 * factor);
  if (mode == Resize::kBilinear) {
    taps.first = low;
    taps.count = 2;
    taps.weights[0] = static_cast<float>(1.0 - t);
    taps.weights[1] = static_cast<float>(t);
    return taps;
  }
  // Keys' cubic convolution with a = -3 / 4.
  constexpr double a = -0.75;
  const auto near = [](double d) { return ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0; };
  const auto far = [](double d) { return ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a; };
  taps.first = low - 1;
  taps.count = 4;
  const double weights[4] = {far(1.0 + t), near(t), near(1.0 - t), far(2.0 - t)};
  for (int k = 0; k < 4; ++k) taps.weights[k] = static_cast<float>(weights[k]);
  return taps;
}

}  // namespace esr
