// Layer normalisation over the channels of every pixel.
#pragma once

#include <cstdint>

#include "packing.h"

namespace esr::cuda {

struct LayerNormArgs {
  View input, output;
  WeightView weight, bias;  // data null: none
  float eps;
  int32_t height, width, channels;
  // Filled in by the launch.
  int64_t pixels;  // of all images
  int32_t units, slots;
};
void launch_layer_norm(LayerNormArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// `forward.output` is the gradient to the input, or with data null is not wanted.
struct LayerNormGradientArgs {
  LayerNormArgs forward;
  View given;                     // the gradient to the result
  WeightView to_weight, to_bias;  // data null: not wanted
  float* partial;                 // filled in by the launch, as is
  int32_t pitch;
};
// Of the workspace that the launch takes.
int64_t layer_norm_gradient_bytes(const LayerNormGradientArgs& args, int64_t batch);
void launch_layer_norm_gradient(LayerNormGradientArgs args, Precision precision, int64_t batch,
                                unsigned char* workspace, device::Stream stream, bool overlap);

}  // namespace esr::cuda
