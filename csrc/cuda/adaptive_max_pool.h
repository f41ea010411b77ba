// Adaptive max pooling: window i of n along a side of s pixels reaches from floor(i s / n) to ceil((i + 1) s / n).
#pragma once

#include <cstdint>

#include "launch.h"
#include "teams.h"
#include "view.h"

namespace esr::cuda {

struct AdaptiveMaxPoolArgs {
  View input, output;
  int32_t height, width, channels;
  int32_t pooled_height, pooled_width;
  // Filled in by the launch.
  Teams teams;
  int64_t windows;   // of all images
  int32_t pitch;     // of `places`
  uint32_t* places;  // of the gradient: where in its window each maximum is, [window][channel]
};
void launch_adaptive_max_pool(AdaptiveMaxPoolArgs args, Precision precision, int64_t batch, device::Stream stream,
                              bool overlap);

// `forward.output` is the gradient to the input: that of a window goes to its first maximum, or to its last NaN.
struct AdaptiveMaxPoolGradientArgs {
  AdaptiveMaxPoolArgs forward;
  View given;  // the gradient to the result
  // Filled in by the launch.
  int32_t units;
  int64_t items;
};
// Of the workspace that the launch takes.
int64_t adaptive_max_pool_gradient_bytes(const AdaptiveMaxPoolGradientArgs& args, int64_t batch);
// Windows have less than 2^31 pixels.
void launch_adaptive_max_pool_gradient(AdaptiveMaxPoolGradientArgs args, Precision precision, int64_t batch,
                                       unsigned char* workspace, device::Stream stream, bool overlap);

}  // namespace esr::cuda
