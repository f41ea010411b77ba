// 3x3 convolutions with Hopper's products of a warpgroup, which read both operands from shared memory.
#pragma once

#include <cstdint>

#include "convolution.h"
#include "packing.h"

namespace esr::cuda {

// A warpgroup (four warps) computes tiles of 8x16 pixels, as two products of 8x8: a product's 64 rows are eight rows of
// eight neighbours, so that 16 bytes of each are a descriptor's group.
inline constexpr int kWgmmaHeight = 8, kWgmmaWidthLog2 = 4;
inline constexpr int kWgmmaInputHeight = kWgmmaHeight + 2, kWgmmaInputWidth = (1 << kWgmmaWidthLog2) + 2;
inline constexpr int kWgmmaProducts = 2;    // of a tile, side by side
inline constexpr int kMostWgmmaGroups = 4;  // warpgroups of a block, each with tiles of its own
inline constexpr int kMostWgmmaUnits = 8;   // of input channels
inline constexpr int kMostWgmmaSteps = 9 * kMostWgmmaUnits / 2;

// How the weights lie in memory, which is also how they lie in shared memory: for every step of two units, the first
// unit's eight values of every output channel, then the second one's.
struct WgmmaPacking {
  Precision precision = Precision::kFloat16;
  int32_t units = 0;   // of input channels
  int32_t tiles = 1;   // of 8 output channels of a block
  int32_t blocks = 1;  // of output channels
  int32_t out_channels = 0;

  // The unit that half a step multiplies, as a tap and a unit of its pixel: a tap's units in pairs, then, where they
  // are odd, the last units of all taps in pairs, and a unit of zeros for the ninth.
  struct Place {
    int32_t tap, unit;
  };
  constexpr Place place(int32_t half) const {
    const int32_t even = units / 2 * 2;
    if (half < 9 * even) return {half / even, half % even};
    const int32_t tap = half - 9 * even;
    return tap < 9 ? Place{tap, even} : Place{8, even + 1};
  }
  constexpr int32_t steps() const { return Packing::steps(9, units); }
  // Units of a tile's pixels, with those that are zeros.
  constexpr int32_t planes() const { return units + units % 2; }
  constexpr int32_t step_bytes() const { return 2 * tiles * 8 * kUnitBytes; }
  constexpr int32_t block_bytes() const { return steps() * step_bytes(); }
  constexpr int64_t weight_bytes() const { return int64_t{blocks} * block_bytes(); }
  constexpr int32_t padded_channels() const { return blocks * tiles * 8; }
  // Weights, then a float32 bias for every padded channel.
  constexpr int64_t bytes() const { return weight_bytes() + int64_t{padded_channels()} * 4; }
};

struct WgmmaPackArgs {
  PackArgs pack;  // of the convolution; its packing does not count
  WgmmaPacking packing;
};

void launch_wgmma_pack(const WgmmaPackArgs& args, device::Stream stream);

struct WgmmaArgs {
  ConvolutionArgs convolution;
  WgmmaPacking packing;
  int32_t groups;       // warpgroups of a block
  int32_t plane_bytes;  // from a unit of a tile's pixels to the next unit
  // Offsets in shared memory. Weights lie at 0, stages, of every warpgroup its own, behind them.
  int32_t stages_at, results_at, barrier_at;
  // For every step what to add to the descriptor of a product's first pixel: where the first unit lies from there, and
  // in the upper half how much further the second one does, both over 16.
  uint32_t offsets[kMostWgmmaSteps];
};

struct Wgmma {
  WgmmaArgs args = {};
  Packing tail;  // where args.convolution.tail_weights are given
  device::LaunchShape shape;
};

// The packing of a 3x3 convolution, and whether the device has the instructions and room in shared memory.
bool plan_wgmma(Precision precision, int32_t channels, int32_t out_channels, WgmmaPacking* packing);

// Whether the convolution with this packing has room for the 1x1 convolution `tail` of its result (plan_tail()).
bool fits_wgmma_tail(const WgmmaPacking& packing, const Packing& tail);

// Fills in what follows from the packing, the sizes, and the device; the rest of `args` is the caller's.
void prepare_wgmma(Wgmma& wgmma, int64_t batch);

void launch_wgmma(const Wgmma& wgmma, device::Stream stream, bool overlap);

void launch_wgmma_float16(const Wgmma& wgmma, device::Stream stream, bool overlap);
void launch_wgmma_bfloat16(const Wgmma& wgmma, device::Stream stream, bool overlap);

}  // namespace esr::cuda
