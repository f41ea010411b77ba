// Sums in parts that depend on nothing but the sizes, added up in order: the same bits on every GPU.
#pragma once

#include <cstdint>

#include "packing.h"

namespace esr::cuda {

// partial[part][set][channel]: a weight's taps are the first sets, the bias' gradient is the last one; as often as
// there are groups of channels.
struct PartsArgs {
  const float* partial;
  int64_t parts;
  int32_t groups;    // of channels
  int32_t channels;  // of a group
  int32_t pitch;     // from set to set
  int32_t taps_across, taps;
  WeightView weight, bias;  // data null: not wanted
};
void launch_parts(const PartsArgs& args, device::Stream stream, bool overlap);

}  // namespace esr::cuda
