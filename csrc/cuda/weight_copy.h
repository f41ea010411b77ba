// Weights that kernels read one by one, kept as float32.
#pragma once

#include "packing.h"

namespace esr::cuda {

// Writes a weight's elements in order, as float32 values; `copied_weight` is what it then reads like at `out`.
void launch_weight_copy(const WeightView& weight, float* out, device::Stream stream);
WeightView copied_weight(const WeightView& weight, const unsigned char* out);

}  // namespace esr::cuda
