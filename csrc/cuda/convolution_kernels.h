// The instantiations of the convolution kernel, two source files for each precision.
#pragma once

#include "convolution.h"

namespace esr::cuda {

// Floats from a pixel to the next where results are turned around: rows of a fragment fall on different banks.
constexpr int result_pitch(int channel_tiles) { return (channel_tiles | 1) * 8; }

void launch_float16(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_bfloat16(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32x3(const Convolution& convolution, device::Stream stream, bool overlap);
// All but a plain forward pass.
void launch_float16_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_bfloat16_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32x3_backward(const Convolution& convolution, device::Stream stream, bool overlap);

}  // namespace esr::cuda
