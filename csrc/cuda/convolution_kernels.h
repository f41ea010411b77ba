// The instantiations of the convolution kernel, three source files for each precision.
#pragma once

#include "convolution.h"

namespace esr::cuda {

// Floats from a pixel to the next where results are turned around: rows of a fragment fall on different banks.
constexpr int result_pitch(int channel_tiles) { return (channel_tiles | 1) * 8; }

// Bytes from a pixel to the next of a tail's left operand: units in pairs, and one more against bank conflicts.
constexpr int operand_pitch(int channel_tiles, int value_bytes) {
  return ((channel_tiles * 8 * value_bytes / kUnitBytes + 1) / 2 * 2 + 1) * kUnitBytes;
}
// Shared memory where a warp turns its results around; a tail's left operand follows them.
constexpr int result_bytes(int channel_tiles, int value_bytes, bool tail) {
  return 16 * (result_pitch(channel_tiles) * 4 + (tail ? operand_pitch(channel_tiles, value_bytes) : 0));
}
// Steps of a tail's product over the channels of the first.
constexpr int tail_steps(int channel_tiles, int value_bytes) {
  return (channel_tiles * 8 * value_bytes / kUnitBytes + 1) / 2;
}

void launch_float16(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_bfloat16(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32x3(const Convolution& convolution, device::Stream stream, bool overlap);
// All but a plain forward pass.
void launch_float16_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_bfloat16_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32x3_backward(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_float16_half_sums(const Convolution& convolution, device::Stream stream, bool overlap);
// With a 1x1 convolution behind.
void launch_float16_tail(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_bfloat16_tail(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32_tail(const Convolution& convolution, device::Stream stream, bool overlap);
void launch_tf32x3_tail(const Convolution& convolution, device::Stream stream, bool overlap);

}  // namespace esr::cuda
