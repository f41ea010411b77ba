// Enhanced spatial attention: the launches that are no convolutions.
#pragma once

#include <cstdint>

#include "../common/layout.h"
#include "launch.h"
#include "packing.h"
#include "view.h"

namespace esr::cuda {

inline constexpr int kMostHidden = 64, kMostHiddenTiles = kMostHidden / 8;
inline constexpr int kPool = 7, kPoolStride = 3;

// From where a kernel keeps its weights.
template <typename T, bool kShared>
ESR_DEVICE T load_weights(const unsigned char* p) {
  if constexpr (kShared) {
    return device::load_shared<T>(p);
  } else {
    return device::load_global<T>(p);
  }
}

// ---- low = conv3x3(max_pool(in, 7, stride 3)) -------------------------------------------------------------------

// float32, in the order in which the kernel reads them: [tap][k][group][four outputs][s], each four outputs, of input
// channel 16 group + 4 s + k. Then the bias.
struct LowWeights {
  int32_t hidden = 0;

  constexpr int32_t groups() const { return (hidden + 15) / 16; }
  constexpr int32_t fours() const { return (hidden + 7) / 8 * 2; }  // of outputs
  constexpr int32_t weight_bytes() const { return 9 * 4 * groups() * fours() * 4 * kUnitBytes; }
  constexpr int32_t bytes() const { return weight_bytes() + fours() * kUnitBytes; }
};

struct LowArgs {
  View in, out;                  // blocked
  const unsigned char* weights;  // of LowWeights
  int32_t hidden;
  int32_t units;  // of a pixel
  int32_t in_width;
  int32_t height, width;  // of the pooled map and of the result
  int32_t tiles_across, tiles_down;
  int32_t columns_at, pooled_at;  // offsets in shared memory
  bool relu;
};

// Fills in units, tiles and offsets.
void launch_low(LowArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap);

// ---- out = x sigmoid(w4 (resize(low) + wf x + bf) + b4) ---------------------------------------------------------

// The skip convolution's weights are a Packing of one slab. Those of the last convolution are products' right operands
// as well, [tile of 8 outputs][step][lane]; then its float32 bias.
struct GateWeights {
  Precision precision = Precision::kFloat16;
  int32_t channels = 0, hidden = 0;
  int32_t hidden_tiles = 0;  // of 8 channels: 2, 4, 6 or kMostHiddenTiles

  constexpr bool pairs() const { return precision == Precision::kFloat16 || precision == Precision::kBFloat16; }
  constexpr int32_t channel_tiles() const { return (channels + 7) / 8; }
  constexpr int32_t units() const { return static_cast<int32_t>(ceil_div(channels, unit_channels(precision))); }
  constexpr int32_t steps() const { return pairs() ? hidden_tiles / 2 : hidden_tiles; }  // of the last convolution
  constexpr int32_t lane_bytes() const { return precision == Precision::kTf32x3 ? 16 : 8; }
  constexpr int32_t weight_bytes() const { return channel_tiles() * steps() * 32 * lane_bytes(); }
  constexpr int32_t bytes() const { return weight_bytes() + channel_tiles() * 8 * 4; }
  Packing skip() const;
};

// Decides on the tiles, which depend on the device.
GateWeights plan_gate(Precision precision, int32_t channels, int32_t hidden);

struct GateArgs {
  View x, out;
  View low;                   // blocked
  const unsigned char* skip;  // of GateWeights::skip()
  const unsigned char* last;  // of GateWeights
  int32_t channels;
  int32_t units, units_reciprocal;  // of a pixel of x; 2^20 / units + 1
  int32_t skip_steps, skip_bytes;   // of the skip convolution's weights, without the bias
  int32_t channel_tiles, last_bytes;
  int32_t height, width;
  int32_t low_units, low_height, low_width;
  float per_height, per_width;               // 1 / (2 height), 1 / (2 width)
  int32_t segments, tiles;                   // a tile is 16 pixels of a row, a segment
  int32_t pitch;                             // bytes from a pixel to the next in shared memory
  int32_t tiles_at, tile_bytes, columns_at;  // where the warps' tiles begin; columns_at: in a tile
};

// Fills in what follows from the weights and the sizes.
void launch_gate(GateArgs args, const GateWeights& weights, int64_t batch, device::Stream stream, bool overlap);

// ---- packing ----------------------------------------------------------------------------------------------------

struct EsaPackArgs {
  LowWeights low;
  GateWeights gate;
  WeightView low_weight, low_bias;    // of the 3x3 convolution after the pool
  WeightView gate_weight, gate_bias;  // of the last convolution
  unsigned char* low_out;
  unsigned char* gate_out;
};

void launch_esa_pack(const EsaPackArgs& args, device::Stream stream);

}  // namespace esr::cuda
