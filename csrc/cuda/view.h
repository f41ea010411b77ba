// Feature maps in device memory.
#pragma once

#include <cstdint>

namespace esr::cuda {

// What kernels compute in. float32 values are multiplied as tf32, or as three tf32 products, which is as exact as
// float32.
enum class Precision : int32_t { kFloat16 = 0, kBFloat16 = 1, kTf32 = 2, kTf32x3 = 3 };
inline constexpr int64_t kPrecisionCount = 4;

constexpr int64_t value_bytes(Precision p) { return p == Precision::kFloat16 || p == Precision::kBFloat16 ? 2 : 4; }

// A unit is 16 bytes of one pixel: the channels that a row of ldmatrix and a vector store take.
inline constexpr int kUnitBytes = 16;
constexpr int64_t unit_channels(Precision p) { return kUnitBytes / value_bytes(p); }

// [N, C, H, W], strides in bytes. A blocked view is NHWC in whole units: its data and strides are multiples of a unit,
// and the channels that fill up the last unit are zeros. The internal maps of a plan are blocked, and so is a
// channels_last tensor of the right number of channels.
struct View {
  unsigned char* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0, channel = 0;
  int32_t channels = 0;
  bool blocked = false;
};

}  // namespace esr::cuda
