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

}  // namespace esr::cuda
