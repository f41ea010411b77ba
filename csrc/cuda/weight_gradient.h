// Gradients of a convolution to its weight and bias: sums over pixels, in parts that depend on nothing but the sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "packing.h"

namespace esr::cuda {

struct WeightGradient {
  Precision precision = Precision::kFloat16;
  int32_t taps = 9;  // 1 or 9
  int32_t stride = 1;
  int32_t padding = 1;
  bool reflect = false;
  std::vector<View> inputs;       // up to kMostInputs; their channels are concatenated
  int32_t height = 0, width = 0;  // of the inputs
  View gradient;                  // to the convolution's result
  int32_t out_height = 0, out_width = 0;
  int64_t batch = 0;
  WeightView weight, bias;  // where the gradients go; data null: not wanted
};

// Of the workspace that the launch takes.
int64_t weight_gradient_bytes(const WeightGradient& w);

void launch_weight_gradient(const WeightGradient& w, unsigned char* workspace, device::Stream stream, bool overlap);

}  // namespace esr::cuda
