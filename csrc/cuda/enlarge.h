// A map enlarged by a whole factor, without aligned corners.
#pragma once

#include <cstdint>

#include "../common/resize.h"
#include "launch.h"
#include "view.h"

namespace esr::cuda {

struct EnlargeArgs {
  View input, output;
  int32_t height, width, channels;  // of the input
  int32_t factor;
  ResizeTaps taps[kMostResize];  // of every phase
  // Filled in by the launch.
  int32_t units;
  int64_t items;
};
void launch_enlarge(EnlargeArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

}  // namespace esr::cuda
