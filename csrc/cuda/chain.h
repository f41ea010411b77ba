// Many convolutions, each of the one before, in one launch whose blocks keep a tile of the image each.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace esr::cuda {

inline constexpr int kMostChainLayers = 24;
// Of 8 channels: fewer are not worth a kernel, and more leave no room for tiles that are.
inline constexpr int kFewestChainTiles = 3, kMostChainTiles = 7;
inline constexpr int kFlagBytes = 32;  // from a block's flag to the next one's

// One layer, a 3x3 convolution or a 1x1 one.
struct ChainLayer {
  const unsigned char* weights;  // its bias follows them
  View residual;                 // in device memory, blocked; data null: none, or in shared memory
  View output;                   // where the result goes besides; data null: nowhere
  int32_t out_channels;
  int32_t taps;
  int32_t from_at, to_at;  // in shared memory
  int32_t residual_at;     // in shared memory, -1: not there
  int32_t exchange;        // how many borders are published with this layer's; 0: the next one needs no neighbours
  Activation activation;
  ResidualMode residual_mode;
  float slope;
};

struct ChainArgs {
  ChainLayer layers[kMostChainLayers];
  View input;
  View ring;           // the first of two maps through which borders travel
  int64_t ring_bytes;  // from it to the second
  uint32_t* flags;     // of every block: how many borders it has published
  const float* shift;  // of the input, as in ConvolutionArgs
  const float* scale;
  int32_t layer_count;
  int32_t units;       // of a pixel
  int32_t slab_units;  // of the packed weights of 3x3 convolutions; 1x1 ones have one slab
  int32_t height, width;
  int32_t tile_height, tile_width_log2;
  int32_t tiles_across, tiles_down;
  // Of loading the input: a margin of one pixel.
  int32_t in_tile_height, in_tile_width, stride, padding;
  bool reflect;
  int32_t pitch;                      // bytes from a pixel to the next in shared memory
  int32_t weights_at, weights_bytes;  // two places, of this layer and of the next one
  int32_t tables_at, zeros_at, places_at;
};
// As much as every toolkit passes to a kernel.
static_assert(sizeof(ChainArgs) <= 4096);

// Layers in a row before sizes are known. Values are the chain's input, 0, and the layers' results from 1 on.
struct ChainPlan {
  static constexpr int kNoResidual = -1, kOutside = -2;
  struct Entry {
    Packing packing;
    int residual = kNoResidual;  // a value; kOutside: some other map
  };
  Entry entries[kMostChainLayers];
  int count = 0;
};

// What to compute; `prepare_chain` chooses tiles and shared memory for it.
struct Chain {
  ChainArgs args = {};
  Precision precision = Precision::kFloat16;
  bool stored[kMostChainLayers + 1] = {};  // values that layers read from device memory
  device::LaunchShape shape;

  int64_t flag_bytes() const { return shape.blocks * kFlagBytes; }
};

// Whether convolutions of this packing can be layers of a chain, and those of both of the same one.
bool chainable(const Packing& packing);
bool chain_together(const Packing& first, const Packing& second);

// Fills in what follows from sizes and device; the rest of `args` is the caller's. False: the tiles of these images
// cannot all be resident at once, and blocks would wait for others that have not begun.
bool prepare_chain(Chain& chain, const ChainPlan& plan, int64_t height, int64_t width, int64_t batch);

// Two launches: the first one clears the flags, so that it does not matter how an earlier launch has left them.
void launch_chain(const Chain& chain, device::Stream stream, bool overlap);

// How many blocks are resident at once.
int64_t resident_chain_float16(const device::LaunchShape& shape);
int64_t resident_chain_bfloat16(const device::LaunchShape& shape);
void launch_chain_float16(const Chain& chain, device::Stream stream);
void launch_chain_bfloat16(const Chain& chain, device::Stream stream);

}  // namespace esr::cuda
