// Maps copied, normalised, combined or put through a function, from any layout to any layout.
#pragma once

#include "../common/activation.h"
#include "launch.h"
#include "view.h"

namespace esr::cuda {

struct PointwiseArgs {
  View a, b, output;  // b.data null: of `a` alone
  bool multiplies;    // a * b instead of a + b
  Function function;  // of `a`
  // For every channel, null where there are none: (a - first) * second without a function, else its low and high.
  const float* first;
  const float* second;
  int32_t height, width, channels, units;  // units of 8 channels
  int32_t shuffle;                         // more than 1: `a` is read as the map whose pixel shuffle it is
  int64_t items;                           // images x rows x units x pixels
};

// Fills in what follows from the views; `width` and `height` are theirs.
void launch_pointwise(PointwiseArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

}  // namespace esr::cuda
