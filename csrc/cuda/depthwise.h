// Depthwise convolution: each channel with a filter of its own, stride 1, zeros around that keep the size.
#pragma once

#include <cstdint>
#include <string>

#include "../common/activation.h"
#include "packing.h"

namespace esr::cuda {

inline constexpr int kMostDepthwiseTaps = 7;  // a side

// Maps are in one or two halves, each `channels` of all: the second half's result gates the first's.
struct DepthwiseArgs {
  View input[2];
  WeightView weight, bias;  // of all channels; bias data null: none
  View given;               // the gradient to the operator's result; data null: forward
  View output[2];           // the result in output[0]; with `given`, or where nothing is gated, halves like the input's
  int32_t halves;
  bool gated;
  bool flip;  // the taps in reverse, for the data gradient
  int32_t height, width;
  int32_t channels;  // of a half
  int32_t taps_down, taps_across, dilation;
  Activation activation;
  float slope;
  // Filled in by the launch.
  int32_t slabs;       // of a half's channels
  int32_t row_groups;  // of an image
  int64_t groups;      // of all images
};

// Whether an input of so many channels can be gated, and taps are as kernels have them, else an error of `name`.
void check_depthwise(const std::string& name, int64_t channels, bool gated, const WeightView& weight);
// Fills in what follows from an input of this size: halves and their channels, taps and dilation.
void set_depthwise(DepthwiseArgs& args, int64_t channels, int64_t height, int64_t width, bool gated,
                   const WeightView& weight, int64_t dilation);
// `whole` as one map, or as halves where the second gates the first; blocked where both are whole units.
void set_halves(const DepthwiseArgs& args, const View& whole, Precision precision, View (&halves)[2]);

void launch_depthwise(DepthwiseArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// Gradients to weight and bias (data null: not wanted) of a convolution of `input` whose result has the gradient
// `given`.
struct DepthwiseGradientArgs {
  View input[2], given[2];
  WeightView weight, bias;
  int32_t halves;
  int32_t height, width;
  int32_t channels;  // of a half
  int32_t taps_down, taps_across, dilation;
  // Filled in by the launch.
  float* partial;
  int64_t rows, rows_at_once;  // of all images, and of a part
  int32_t slabs, pitch;
};
// Of the workspace that the launch takes.
int64_t depthwise_gradient_bytes(const DepthwiseGradientArgs& args, int64_t batch);
void launch_depthwise_gradient(DepthwiseGradientArgs args, Precision precision, int64_t batch, unsigned char* workspace,
                               device::Stream stream, bool overlap);

}  // namespace esr::cuda
