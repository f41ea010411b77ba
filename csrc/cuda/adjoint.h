// The parts of backward operators that are no convolutions.
#pragma once

#include <cstdint>

#include "packing.h"

namespace esr::cuda {

// The adjoint of padding a map by one reflected pixel: border gradients go to where their pixels came from.
struct UnpadArgs {
  View padded;  // [height + 2, width + 2]
  View output;
  int32_t height, width, channels;
  int32_t units;  // of 8 channels
  int64_t items;
};
void launch_unpad(UnpadArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// From the gradient to the product weight[o, c, tap] = pointwise[o, c] depthwise[o, tap] those to its factors.
struct FactorsArgs {
  const float* product;  // [o][c][tap]
  WeightView pointwise, depthwise;
  WeightView to_pointwise, to_depthwise;  // data null: not wanted
  int32_t channels;
};
void launch_factors(const FactorsArgs& args, int64_t out_channels, device::Stream stream, bool overlap);

// output = skip + resize(low), bilinear without aligned corners; all maps have the same channels.
struct ResizeArgs {
  View low, skip, output;
  int32_t low_height, low_width;
  int32_t height, width, channels;
  int32_t units;
  int64_t items;
};
void launch_resize(ResizeArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// The adjoint of resizing, without the skip, along one axis after the other.
// `between` holds float32 values: [height, low_width].
struct ResizeAdjoint {
  View from, between, to;
  int32_t height, width, low_height, low_width, channels;
};
void launch_resize_adjoint(const ResizeAdjoint& r, Precision precision, int64_t batch, device::Stream stream,
                           bool overlap);

// max_pool(in, 7, stride 3), and where in its window each maximum was first seen.
inline constexpr int kPoolWindow = 7, kPoolStep = 3;
struct PoolArgs {
  View in, out;
  unsigned char* index;   // [image][y][x][channel, padded to 8] of the result
  int32_t height, width;  // of the result
  int32_t channels;
  int32_t units;
  int64_t items;
};
void launch_pool(PoolArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// The adjoint of the pool, with zeros between its pixels: [2 height - 1, 2 width - 1], as the data gradient of a
// convolution with stride 2 reads it.
struct PoolAdjointArgs {
  View from, to;
  const unsigned char* index;
  int32_t pooled_height, pooled_width;
  int32_t height, width;  // of `to`, with zeros
  int32_t channels;
  int32_t units;
  int64_t items;
};
void launch_pool_adjoint(PoolAdjointArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

}  // namespace esr::cuda
