// x times an activation of the sum of maps that are resized to it, by PyTorch's rules for nearest neighbours and for
// bilinear interpolation without aligned corners.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/resize.h"
#include "launch.h"
#include "teams.h"
#include "view.h"

namespace esr::cuda {

struct ModulateMap {
  View view;
  int32_t height, width;
  // Filled in by the launch.
  bool resized;               // or else it has the size of x
  float per_row, per_column;  // of x, in rows and columns of the map
};

struct ModulateArgs {
  View input, output;
  ModulateMap maps[kMostModulateMaps];
  int32_t count;  // of maps
  bool bilinear;
  int32_t height, width, channels;
  Activation activation;
  float slope;
  // Filled in by the launch.
  int32_t units;
  int64_t items;
};
void launch_modulate(ModulateArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// `forward.output` is the gradient to x; data null: not wanted. The one to the sum of the maps is written to every view
// in `to_sum`: it is that of maps with the size of x.
struct ModulateGradientArgs {
  ModulateArgs forward;
  View given;  // the gradient to the result
  View to_sum[kMostModulateMaps];
  int32_t sums;
};
void launch_modulate_gradient(ModulateGradientArgs args, Precision precision, int64_t batch, device::Stream stream,
                              bool overlap);

// The adjoint of resizing: `to` are gradients to maps of other sizes, from the one to their sum.
struct ResizeGradientArgs {
  View given;
  ModulateMap to[kMostModulateMaps];
  int32_t count;
  bool bilinear;
  int32_t height, width, channels;  // of `given`
  // Filled in by the launch, for each map.
  Teams teams[kMostModulateMaps];
  int64_t windows[kMostModulateMaps];     // pixels of all images
  int64_t blocks_end[kMostModulateMaps];  // the first block that is another map's
};
void launch_resize_gradient(ResizeGradientArgs args, Precision precision, int64_t batch, device::Stream stream,
                            bool overlap);

}  // namespace esr::cuda
