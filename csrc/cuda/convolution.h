// Convolutions as implicit matrix products on tensor cores; docs/cuda.md walks through the kernel.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "launch.h"
#include "view.h"

namespace esr::cuda {

inline constexpr int kMostInputs = 16;  // maps whose concatenation one launch reads
inline constexpr int kMostTiles = 8;    // of 8 output channels, in one block

// How a convolution's weights lie in memory, which is also the order of its products: the concatenated inputs are cut
// into slabs of a few units, in shared memory one (or two) at a time; a slab's taps and units, in pairs, are the steps
// of 16 (tf32: 8) channels of a tensor-core product.
struct Packing {
  Precision precision = Precision::kFloat16;
  int32_t taps = 9;           // 1 or 9
  int32_t slab_units = 1;     // of every slab but an input's last
  int32_t channel_tiles = 1;  // of a block
  int32_t blocks = 1;         // of output channels
  int32_t out_channels = 0;
  int32_t inputs = 1;
  int32_t units[kMostInputs] = {};

  // Steps of a slab of `u` units.
  static constexpr int32_t steps(int32_t taps, int32_t u) { return (taps * u + 1) / 2; }
  // The slab that a step belongs to: its first unit of those of all inputs, and which of its own steps it is.
  struct Slab {
    int32_t first_unit, units, step;
  };
  constexpr Slab slab_of(int32_t step) const {
    int32_t first = 0;
    for (int k = 0; k < inputs; ++k) {
      for (int32_t unit = 0; unit < units[k]; unit += slab_units) {
        const int32_t left = units[k] - unit, count = left < slab_units ? left : slab_units;
        const int32_t own = steps(taps, count);
        if (step < own) return {first + unit, count, step};
        step -= own;
      }
      first += units[k];
    }
    return {0, 1, 0};
  }
  constexpr int32_t total_steps() const {
    int32_t total = 0;
    for (int i = 0; i < inputs; ++i) {
      total += units[i] / slab_units * steps(taps, slab_units);
      if (units[i] % slab_units > 0) total += steps(taps, units[i] % slab_units);
    }
    return total;
  }
  // A lane's part of one step and one tile of 8 output channels: two registers; for tf32x3 two more with what tf32 cuts
  // off.
  constexpr int32_t lane_bytes() const { return precision == Precision::kTf32x3 ? 16 : 8; }
  constexpr int32_t step_bytes() const { return channel_tiles * 32 * lane_bytes(); }
  constexpr int64_t weight_bytes() const { return int64_t{blocks} * total_steps() * step_bytes(); }
  constexpr int32_t padded_channels() const { return blocks * channel_tiles * 8; }
  // Weights, then a float32 bias for every padded channel.
  constexpr int64_t bytes() const { return weight_bytes() + int64_t{padded_channels()} * 4; }
};

// What a convolution writes, with h its sums.
enum class Pass : int32_t {
  kForward = 0,   // act(h) with the residual; second: h
  kBackward = 1,  // the gradient to h, `given` being the one to the forward result; second: the one to the residual
  kChain = 2,     // (h + residual) act'(given): h is the gradient to act(given)
};

// What a kernel is compiled for.
// kHalfSums: float16 products are summed in float16 over two steps, then in float32. GeForce cards of sm_86 and sm_89
// do the former at twice the rate.
enum class Variant { kForward, kBackward, kTail, kHalfSums };

struct ConvolutionArgs {
  View inputs[kMostInputs];
  int32_t units[kMostInputs];
  int32_t input_count;
  View output;
  View residual;  // data null: none
  View given;     // not read in a forward pass
  View second;    // data null: none
  const unsigned char* weights;
  const float* bias;
  // (value - shift[c]) * scale[c] of every input value, but not of the padding; null: as it is.
  const float* shift;
  const float* scale;
  int32_t out_channels;
  int32_t total_steps;
  int32_t taps_across;  // 1 or 3
  int32_t stride;
  int32_t padding;
  bool reflect;
  bool weights_stay;  // one slab: its weights are loaded once for all tiles of a block
  int32_t slab_units, stages;
  int32_t height, width;          // of the inputs
  int32_t out_height, out_width;  // before a pixel shuffle
  int32_t tile_height, tile_width_log2;
  int32_t tiles_across, tiles_down, tiles;
  int32_t in_tile_height, in_tile_width;
  int32_t pitch;                                        // bytes from a pixel to the next in shared memory
  int32_t weights_at, table_at, zeros_at, stage_bytes;  // offsets in a stage
  int32_t shuffle;                                      // upscale factor of a pixel shuffle; 1: none
  Activation activation;
  ResidualMode residual_mode;
  float slope;
  Pass pass;
  // A 1x1 convolution of the result, in the same launch; null: none.
  const unsigned char* tail_weights;
  const float* tail_bias;
  int32_t tail_channels;
  int32_t tail_at;  // its weights, behind the stages
  Activation tail_activation;
  float tail_slope;
};

// What to compute; `prepare_convolution` chooses tiles and shared memory for it.
struct Convolution {
  Packing packing;
  bool half_sums = false;  // where the variant exists: float16, forward, no tail
  Packing tail;            // where args.tail_weights are given
  ConvolutionArgs args = {};
  device::LaunchShape shape;
};

// The packing of a convolution whose inputs have these channels.
Packing plan_packing(Precision precision, int32_t taps, const int32_t* channels, int32_t inputs, int32_t out_channels,
                     int32_t stride);

// The packing of a 1x1 convolution of the result of `first` in the same launch; whether there is room for it.
bool plan_tail(const Packing& first, int32_t out_channels, Packing* tail);

// The output pixels of a tile, and the input pixels under them.
struct TileSize {
  int height, width_log2, in_height, in_width;
};

// Covers the output of so many images with tiles; how many there are.
int64_t set_tiles(ConvolutionArgs& args, int64_t batch, const TileSize& tile);
// The same for a 3x3 convolution of stride 1 whose output is as large as its input.
int64_t set_3x3_tiles(ConvolutionArgs& args, int64_t batch, int32_t out_channels, const TileSize& tile);

// Fills in what follows from the packing, the sizes, and the device; the rest of `args` is the caller's.
void prepare_convolution(Convolution& convolution, int64_t batch);

void launch_convolution(const Convolution& convolution, device::Stream stream, bool overlap);

}  // namespace esr::cuda
