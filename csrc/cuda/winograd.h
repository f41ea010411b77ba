// 3x3 convolutions by Winograd's F(2x2, 3x3): 16 products for four pixels instead of 36.
#pragma once

#include <cstdint>

#include "convolution.h"
#include "packing.h"

namespace esr::cuda {

// A block of threads computes tiles of 8x32 pixels: four rows of 16 squares of 2x2, each a warp's, or two warps' with
// half of the channels each.
inline constexpr int kWinogradRows = 4, kSquaresAcross = 16;
inline constexpr int kWinogradPositions = 16;  // of a transformed square of 4x4 input pixels
inline constexpr int kMostWinogradTiles = 4;   // of 8 output channels, in one warp

// How the transformed weights lie in memory: for every step of 16 input channels and every position, fragments as those
// of Packing. Products are float16 ones, of bfloat16 maps as well: its eight bits would not do for sums of four pixels.
struct WinogradPacking {
  int32_t units = 0;   // of input channels
  int32_t tiles = 1;   // of 8 output channels of a warp
  int32_t groups = 1;  // of warps with different channels
  int32_t blocks = 1;  // of output channels
  int32_t out_channels = 0;

  constexpr int32_t steps() const { return (units + 1) / 2; }
  constexpr int32_t position_bytes() const { return groups * tiles * 32 * 8; }
  constexpr int32_t block_bytes() const { return steps() * kWinogradPositions * position_bytes(); }
  constexpr int64_t weight_bytes() const { return int64_t{blocks} * block_bytes(); }
  constexpr int32_t padded_channels() const { return blocks * groups * tiles * 8; }
  // Weights, then a float32 bias for every padded channel.
  constexpr int64_t bytes() const { return weight_bytes() + int64_t{padded_channels()} * 4; }
};

struct WinogradPackArgs {
  PackArgs pack;  // of the convolution; its packing does not count
  WinogradPacking packing;
};

void launch_winograd_pack(const WinogradPackArgs& args, device::Stream stream);

struct WinogradArgs {
  ConvolutionArgs convolution;
  WinogradPacking packing;
  int32_t results_at;  // in shared memory, where results are turned around
};

struct Winograd {
  Precision precision = Precision::kFloat16;
  WinogradArgs args = {};
  device::LaunchShape shape;
};

// The packing of a 3x3 convolution, and whether there is a kernel and room in shared memory for it.
bool plan_winograd(Precision precision, int32_t channels, int32_t out_channels, WinogradPacking* packing);

// Fills in what follows from the packing, the sizes, and the device; the rest of `args` is the caller's.
void prepare_winograd(Winograd& winograd, int64_t batch);

void launch_winograd(const Winograd& winograd, device::Stream stream, bool overlap);

void launch_winograd_float16(const Winograd& winograd, device::Stream stream, bool overlap);
void launch_winograd_bfloat16(const Winograd& winograd, device::Stream stream, bool overlap);

}  // namespace esr::cuda
