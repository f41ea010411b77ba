#include "convolution.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../common/layout.h"
#include "convolution_kernels.h"

namespace esr::cuda {
namespace {

constexpr int kMostSlabUnits = 8;
constexpr int kTilePixels = 256;
constexpr int kTileWidthLog2 = 5;

int pixels_of_warp(int channel_tiles) { return (channel_tiles <= 4 ? 4 : 2) * 16; }

// The shape of a tile and of what it reads.
struct TileShape : TileSize {
  int warps;
};

TileShape tile_shape(int channel_tiles, int pixels, int width_log2, int taps, int stride) {
  const int across = taps == 9 ? 3 : 1;
  TileShape t;
  t.width_log2 = width_log2;
  t.height = pixels >> width_log2;
  t.in_height = (t.height - 1) * stride + across;
  t.in_width = ((1 << width_log2) - 1) * stride + across;
  t.warps = pixels / pixels_of_warp(channel_tiles);
  return t;
}

TileShape largest_tile(int channel_tiles, int taps, int stride) {
  return stride == 1 ? tile_shape(channel_tiles, kTilePixels, kTileWidthLog2, taps, stride)
                     : tile_shape(channel_tiles, kTilePixels / 2, kTileWidthLog2 - 1, taps, stride);
}

// Offsets of a stage's parts: input pixels, weights, the table of offsets, zeros. In the end the results lie over all
// of it, but for weights that stay.
struct StageLayout {
  int pitch, weights_at, table_at, zeros_at, bytes, shared_bytes;
};

StageLayout stage_layout(const Packing& p, const TileShape& t, int units, int stages, bool tail = false) {
  StageLayout s;
  // An odd number of units: eight pixels that ldmatrix reads at once fall on different banks.
  s.pitch = (units | 1) * kUnitBytes;
  const int pixels = t.in_height * t.in_width * s.pitch;
  const int results = t.warps * result_bytes(p.channel_tiles, static_cast<int>(value_bytes(p.precision)), tail);
  const int steps = Packing::steps(p.taps, units);
  s.weights_at = stages == 1 ? std::max(pixels, results) : pixels;
  s.table_at = s.weights_at + steps * p.step_bytes();
  s.zeros_at = static_cast<int>(round_up(s.table_at + 2 * steps * 4, kUnitBytes));
  s.bytes = s.zeros_at + kUnitBytes;
  s.shared_bytes = std::max(stages * s.bytes, results);
  return s;
}

// Equal slabs of at most `units`.
int balanced(int total, int units) { return static_cast<int>(ceil_div(total, ceil_div(total, units))); }

}  // namespace

Packing plan_packing(Precision precision, int32_t taps, const int32_t* channels, int32_t inputs, int32_t out_channels,
                     int32_t stride) {
  Packing p;
  p.precision = precision;
  p.taps = taps;
  p.inputs = inputs;
  p.out_channels = out_channels;
  const int64_t tiles = ceil_div(out_channels, 8);
  p.blocks = static_cast<int32_t>(ceil_div(tiles, kMostTiles));
  p.channel_tiles = static_cast<int32_t>(ceil_div(tiles, p.blocks));
  int most = 0;
  for (int i = 0; i < inputs; ++i) {
    p.units[i] = static_cast<int32_t>(ceil_div(channels[i], unit_channels(precision)));
    most = std::max(most, p.units[i]);
  }
  const TileShape tile = largest_tile(p.channel_tiles, taps, stride);
  const device::Properties& gpu = device::properties();
  constexpr int kReserved = 1024;  // of every block, by the runtime
  // Two blocks on a multiprocessor hide each other's latencies; one slab spares the second stage and, where a block
  // computes several tiles, loading weights again.
  for (const int limit : {std::min(gpu.shared_bytes_in_all / 2 - kReserved, gpu.shared_bytes), gpu.shared_bytes}) {
    if (inputs == 1 && most <= kMostSlabUnits && stage_layout(p, tile, most, 1).shared_bytes <= limit) {
      p.slab_units = most;
      return p;
    }
    for (int units = std::min(most, kMostSlabUnits); units > 0; --units) {
      p.slab_units = balanced(most, units);
      const bool small = units == 1 && most > 1;
      if (stage_layout(p, tile, p.slab_units, 2).shared_bytes <= limit && (!small || limit == gpu.shared_bytes))
        return p;
    }
  }
  STD_TORCH_CHECK(false, "a convolution to ", out_channels, " channels does not fit into ", gpu.shared_bytes,
                  " bytes of shared memory");
}

bool plan_tail(const Packing& first, int32_t out_channels, Packing* tail) {
  if (first.blocks > 1 || out_channels > first.channel_tiles * 8) return false;
  tail->precision = first.precision;
  tail->taps = 1;
  tail->channel_tiles = first.channel_tiles;
  tail->out_channels = out_channels;
  tail->units[0] = tail->slab_units =
      static_cast<int32_t>(ceil_div(first.out_channels, unit_channels(first.precision)));
  const TileShape tile = largest_tile(first.channel_tiles, first.taps, 1);
  const int stages = first.inputs == 1 && first.units[0] == first.slab_units ? 1 : 2;
  return stage_layout(first, tile, first.slab_units, stages, true).shared_bytes + tail->weight_bytes() <=
         device::properties().shared_bytes;
}

int64_t set_tiles(ConvolutionArgs& a, int64_t batch, const TileSize& tile) {
  a.tile_height = tile.height;
  a.tile_width_log2 = tile.width_log2;
  a.in_tile_height = tile.in_height;
  a.in_tile_width = tile.in_width;
  a.tiles_across = static_cast<int32_t>(ceil_div(a.out_width, int64_t{1} << tile.width_log2));
  a.tiles_down = static_cast<int32_t>(ceil_div(a.out_height, tile.height));
  const int64_t tiles = batch * a.tiles_across * a.tiles_down;
  STD_TORCH_CHECK(tiles < INT32_MAX, "a convolution of ", batch, " images of ", a.out_height, "x", a.out_width,
                  " is too large for one launch");
  a.tiles = static_cast<int32_t>(tiles);
  return tiles;
}

int64_t set_3x3_tiles(ConvolutionArgs& a, int64_t batch, int32_t out_channels, const TileSize& tile) {
  a.out_channels = out_channels;
  a.taps_across = 3;
  a.stride = 1;
  a.padding = 1;
  a.out_height = a.height;
  a.out_width = a.width;
  return set_tiles(a, batch, tile);
}

void prepare_convolution(Convolution& convolution, int64_t batch) {
  const Packing& p = convolution.packing;
  ConvolutionArgs& a = convolution.args;
  const device::Properties& gpu = device::properties();
  TileShape tile = largest_tile(p.channel_tiles, p.taps, a.stride);
  const auto count = [&](const TileShape& t) {
    return ceil_div(a.out_height, t.height) * ceil_div(a.out_width, int64_t{1} << t.width_log2) * batch * p.blocks;
  };
  // Small images: smaller tiles, as long as multiprocessors are left without one.
  for (int pixels = tile.height << tile.width_log2;
       pixels > pixels_of_warp(p.channel_tiles) && count(tile) < gpu.multiprocessors && pixels > 32;) {
    pixels /= 2;
    tile = tile_shape(p.channel_tiles, pixels, pixels < 128 ? 4 : tile.width_log2, p.taps, a.stride);
  }
  a.taps_across = p.taps == 9 ? 3 : 1;
  a.input_count = p.inputs;
  std::copy(p.units, p.units + kMostInputs, a.units);
  a.out_channels = p.out_channels;
  a.total_steps = p.total_steps();
  a.slab_units = p.slab_units;
  const bool single = p.inputs == 1 && p.units[0] == p.slab_units;
  a.stages = single ? 1 : 2;
  a.weights_stay = single;
  const int64_t tiles = set_tiles(a, batch, tile);
  const StageLayout stage = stage_layout(p, tile, p.slab_units, a.stages, a.tail_weights != nullptr);
  a.pitch = stage.pitch;
  a.weights_at = stage.weights_at;
  a.table_at = stage.table_at;
  a.zeros_at = stage.zeros_at;
  a.stage_bytes = stage.bytes;
  device::LaunchShape& shape = convolution.shape;
  shape.threads = tile.warps * 32;
  shape.shared_bytes = stage.shared_bytes;
  if (a.tail_weights != nullptr) {
    a.tail_at = static_cast<int32_t>(round_up(shape.shared_bytes, kUnitBytes));
    a.tail_channels = convolution.tail.out_channels;
    shape.shared_bytes = a.tail_at + static_cast<int>(convolution.tail.weight_bytes());
  }
  shape.rows = p.blocks;
  shape.instance = p.channel_tiles;
  constexpr int kRegistersPerThread = 128;  // of __launch_bounds__(256, 2)
  const int64_t resident =
      std::max<int64_t>(1, std::min<int64_t>(65536 / (kRegistersPerThread * shape.threads),
                                             gpu.shared_bytes_in_all / (shape.shared_bytes + 1024)));
  shape.blocks =
      single ? std::min<int64_t>(tiles, std::max<int64_t>(1, gpu.multiprocessors * resident / p.blocks)) : tiles;
}

void launch_convolution(const Convolution& c, device::Stream stream, bool overlap) {
  using Launch = void (*)(const Convolution&, device::Stream, bool);
  constexpr Launch kForward[] = {launch_float16, launch_bfloat16, launch_tf32, launch_tf32x3};
  constexpr Launch kBackward[] = {launch_float16_backward, launch_bfloat16_backward, launch_tf32_backward,
                                  launch_tf32x3_backward};
  constexpr Launch kTail[] = {launch_float16_tail, launch_bfloat16_tail, launch_tf32_tail, launch_tf32x3_tail};
  const bool backward = c.args.pass != Pass::kForward || c.args.second.data != nullptr;
  const bool tail = c.args.tail_weights != nullptr;
  if (c.half_sums && c.packing.precision == Precision::kFloat16 && !backward && !tail) {
    return launch_float16_half_sums(c, stream, overlap);
  }
  const Launch(&launches)[kPrecisionCount] = backward ? kBackward : (tail ? kTail : kForward);
  launches[static_cast<int32_t>(c.packing.precision)](c, stream, overlap);
}

}  // namespace esr::cuda
