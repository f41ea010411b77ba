// Weights in the order in which the convolution kernel reads them.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace esr::cuda {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t dtype_bytes(Dtype d) { return d == Dtype::kFloat32 ? 4 : 2; }

// A weight in device memory: up to four dimensions, strides in elements. data null: none.
struct WeightView {
  const unsigned char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int32_t dimensions = 0;
  int32_t sizes[4] = {};
  int64_t strides[4] = {};
};

// The weight of the convolution that is this one's data gradient: taps in reverse, input and output channels swapped.
WeightView adjoint(WeightView weight);
// The part for input channels [first, first + count).
WeightView input_channels(WeightView weight, int64_t first, int64_t count);

// How the convolution's weight arises from those given.
enum class Composition : int32_t {
  kPlain = 0,      // weight[o, i, tap]
  kDepthwise = 1,  // weight[o, 0, tap] inner[o, i]: a 1x1 convolution, then a depthwise one; or the adjoint of both
  kProduct = 2,    // sum over m of weight[o, m, tap] inner[m, i]: a 1x1 convolution, then a dense one without padding
};

inline constexpr int kMostMaps = 64;  // maps that a layer concatenates

struct PackArgs {
  Packing packing;
  // Of every map that is concatenated. More maps than the packing has inputs lie in one, in whole units each.
  int32_t channels[kMostMaps];
  int32_t maps;
  WeightView weight, inner, bias, inner_bias;
  Composition composition;
  unsigned char* out;
};

void launch_pack(const PackArgs& args, device::Stream stream);

// Writes up to kMostConstants float32 values.
inline constexpr int kMostConstants = 256;
struct ConstantsArgs {
  float values[kMostConstants];
  int32_t count;
  float* out;
};
void launch_constants(const ConstantsArgs& args, device::Stream stream);

}  // namespace esr::cuda
