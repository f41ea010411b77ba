// Maps copied, normalised or added, from any layout to any layout.
#pragma once

#include "launch.h"
#include "view.h"

namespace esr::cuda {

struct PointwiseArgs {
  View a, b, output;   // b.data null: a copy
  const float* shift;  // (a - shift[c]) * scale[c] of every channel; null: as it is
  const float* scale;
  int32_t height, width, channels, units;  // units of 8 channels
  int32_t shuffle;                         // more than 1: `a` is read as the map whose pixel shuffle it is
  int64_t items;                           // images x rows x units x pixels
};

// Fills in what follows from the views; `width` and `height` are theirs.
void launch_pointwise(PointwiseArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

}  // namespace esr::cuda
