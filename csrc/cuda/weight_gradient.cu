#include "weight_gradient.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../common/layout.h"
#include "convolution_kernel.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

// A block sums up kBlock output channels (kM x 16, rows of products) by kBlock input channels (kN x 8, columns) for up
// to kProducts taps of a row or, of a 1x1 convolution, kProducts blocks of input channels. Its warps divide rows of
// taps and pixels among themselves.
constexpr int kWarps = 6;
constexpr int kThreads = kWarps * 32;
constexpr int kBlock = 32;
constexpr int kProducts = 3;
constexpr int kM = kBlock / 16;
constexpr int kN = kBlock / 8;
constexpr int kStep = 16;  // pixels of a row whose products are summed up at once

// A map's part of a tile, as load_input reads it.
struct TileReader {
  int32_t height, width;
  int32_t in_tile_height, in_tile_width, pitch;
  int32_t stride, padding;
  bool reflect;
  const float* shift;
  const float* scale;
};

struct WeightGradientArgs {
  View inputs[kMostInputs];
  View gradient;
  TileReader x, g;
  int32_t taps_across;
  int32_t input_blocks;    // of all inputs
  int32_t blocks_at_once;  // input blocks of one block of threads
  int32_t rows_across;     // blocks of threads along input channels
  int32_t tile_height, tile_width_log2;
  int32_t tiles_across, tiles_down, tiles;
  int32_t gradient_at, stage_bytes, stages;
  float* partial;       // [parts x groups][block row][product][o: kBlock][i: kBlock]
  float* partial_bias;  // [parts x groups][o]; null: not wanted
  bool weight;
};

// Warps that divide the pixels of a tile.
ESR_DEVICE int pixel_groups(int taps_across) { return kWarps / taps_across; }

// Units [unit, unit + units) of an input.
struct InputBlock {
  int input, unit, units;
};

template <typename Value>
ESR_DEVICE InputBlock find_block(const WeightGradientArgs& a, int index) {
  constexpr int kUnits = kBlock * static_cast<int>(sizeof(Value)) / kUnitBytes, kChannels = kBlock / kUnits;
  int input = 0;
  while (true) {
    const int units = (a.inputs[input].channels + kChannels - 1) / kChannels;
    const int unit = index * kUnits;
    if (unit < units) return {input, unit, units - unit < kUnits ? units - unit : kUnits};
    index -= (units + kUnits - 1) / kUnits;
    ++input;
  }
}

// Products of one warp's pixels of a tile, added to its sums.
template <typename P>
struct Multiplier {
  using Value = typename P::Value;
  static constexpr bool kHalves = sizeof(Value) == 2;

  const WeightGradientArgs& a;
  int rows, columns, products;  // how many of kM, kN, kProducts there are
  int product_bytes;            // from one product's input to the next one's
  bool bias;

  ESR_DEVICE void step(const unsigned char* g, const unsigned char* x, float (&sums)[kProducts][kM][kN][4],
                       float (&bias_sums)[kM][4]) const {
    if constexpr (kHalves) {
      step_of_halves(g, x, sums, bias_sums);
    } else {
      for (int half = 0; half < 2; ++half) {
        step_of_floats(g + half * (kStep / 2) * a.g.pitch, x + half * (kStep / 2) * a.x.stride * a.x.pitch, sums,
                       bias_sums);
      }
    }
  }

  ESR_DEVICE void step_of_halves(const unsigned char* g, const unsigned char* x, float (&sums)[kProducts][kM][kN][4],
                                 float (&bias_sums)[kM][4]) const {
    const int lane = device::thread_index() & 31;
    g += ((lane & 7) + (lane >> 4) * 8) * a.g.pitch + ((lane >> 3) & 1) * kUnitBytes;
    x += (lane & 15) * a.x.stride * a.x.pitch + (lane >> 4) * kUnitBytes;
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= rows) continue;
      device::load_matrices_transposed(left[m], g + m * 2 * kUnitBytes);
      if (bias) {
        const uint32_t ones = device::pack_pair<Value>(1.0f, 1.0f);
        device::multiply_add<typename P::Product>(bias_sums[m], left[m], ones, ones);
      }
    }
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      if (k >= products) continue;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        if (n >= columns) continue;
        uint32_t right[4];
        device::load_matrices_transposed(right, x + k * product_bytes + n * kUnitBytes);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if (m >= rows) continue;
          device::multiply_add<typename P::Product>(sums[k][m][n], left[m], right[0], right[1]);
          if (n + 1 >= columns) continue;
          device::multiply_add<typename P::Product>(sums[k][m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  // Half as many pixels, in products of depth 8.
  ESR_DEVICE void step_of_floats(const unsigned char* g, const unsigned char* x, float (&sums)[kProducts][kM][kN][4],
                                 float (&bias_sums)[kM][4]) const {
    const int lane = device::thread_index() & 31;
    const int row = lane >> 2, pixel = lane & 3;
    g += pixel * a.g.pitch + row * 4;
    x += pixel * a.x.stride * a.x.pitch + row * 4;
    const int four_pixels = 4 * a.x.stride * a.x.pitch;
    uint32_t high[kM][4], low[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= rows) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = device::load_shared<float>(g + (i >> 1) * 4 * a.g.pitch + (m * 16 + (i & 1) * 8) * 4);
        high[m][i] = device::round_tf32(v);
        low[m][i] = device::round_tf32(v - device::bits_float(high[m][i]));
        if (bias) bias_sums[m][(i & 1) * 2] += v;
      }
    }
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      if (k >= products) continue;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (n >= columns) continue;
        const unsigned char* p = x + k * product_bytes + n * 32;
        const float v0 = device::load_shared<float>(p), v1 = device::load_shared<float>(p + four_pixels);
        const uint32_t b0 = device::round_tf32(v0), b1 = device::round_tf32(v1);
        if constexpr (P::kWeights == 4) {
          const uint32_t c0 = device::round_tf32(v0 - device::bits_float(b0));
          const uint32_t c1 = device::round_tf32(v1 - device::bits_float(b1));
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            if (m >= rows) continue;
            device::multiply_add<device::tf32>(sums[k][m][n], low[m], b0, b1);
            device::multiply_add<device::tf32>(sums[k][m][n], high[m], c0, c1);
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if (m >= rows) continue;
          device::multiply_add<device::tf32>(sums[k][m][n], high[m], b0, b1);
        }
      }
    }
  }
};

template <typename P>
ESR_KERNEL(kThreads, 2)
weight_gradient_kernel(ESR_ARGUMENT(WeightGradientArgs) a) {
  using Value = typename P::Value;
  constexpr int kTileUnits = 8 * static_cast<int>(sizeof(Value)) / kUnitBytes;  // of 8 channels
  constexpr int kBlockUnits = kN * kTileUnits;
  unsigned char* const shared = device::shared_memory();
  const int thread = device::thread_index(), lane = thread & 31, warp = thread >> 5;
  const int groups = pixel_groups(a.taps_across);
  const int group = warp / a.taps_across, tap_row = warp - group * a.taps_across;
  const int row_of_blocks = device::block_row() / a.rows_across;
  const int first_block = (device::block_row() - row_of_blocks * a.rows_across) * a.blocks_at_once;
  const int blocks_left = a.input_blocks - first_block;
  const int blocks = blocks_left < a.blocks_at_once ? blocks_left : a.blocks_at_once;

  // Where an input block has fewer units than the widest, and where that fills no pair of tiles, zeros are multiplied.
  int widest = 0;
  bool gaps = false;
  for (int i = 0; i < blocks; ++i) {
    const int units = find_block<Value>(a, first_block + i).units;
    gaps = gaps || (i > 0 && units != widest);
    widest = units > widest ? units : widest;
  }
  const int gradient_unit = row_of_blocks * kBlockUnits;
  const int units_left =
      (a.gradient.channels * static_cast<int>(sizeof(Value)) + kUnitBytes - 1) / kUnitBytes - gradient_unit;
  const int gradient_units = units_left < kBlockUnits ? units_left : kBlockUnits;
  gaps = gaps || widest % (2 * kTileUnits) != 0 || gradient_units % (2 * kTileUnits) != 0;
  if (gaps) {
    for (int i = thread; i < a.stages * a.stage_bytes / kUnitBytes; i += kThreads) {
      device::store_shared(shared + i * kUnitBytes, U32x4{0, 0, 0, 0});
    }
    device::sync_block();
  }
  const Multiplier<P> multiplier = {
      a,
      (gradient_units + 2 * kTileUnits - 1) / (2 * kTileUnits),
      (widest + kTileUnits - 1) / kTileUnits,
      !a.weight ? 0 : (a.taps_across > 1 ? kProducts : blocks),
      a.taps_across > 1 ? a.x.pitch : kBlockUnits * kUnitBytes,
      a.partial_bias != nullptr && first_block == 0 && tap_row == 0,
  };

  device::wait_for_previous_grid();
  device::allow_next_grid();

  const auto load = [&](int t, unsigned char* stage) {
    const Tile tile = locate(a, t);
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      const InputBlock b = find_block<Value>(a, first_block + i);
      load_input<Value>(a.x, a.inputs[b.input], tile, b.unit, b.units, stage + i * kBlockUnits * kUnitBytes);
    }
    load_input<Value>(a.g, a.gradient, tile, gradient_unit, gradient_units, stage + a.gradient_at);
    device::commit_copies();
  };

  float sums[kProducts][kM][kN][4] = {}, bias_sums[kM][4] = {};
  const int steps = (a.tile_height << a.tile_width_log2) / kStep;
  const int steps_across_log2 = a.tile_width_log2 - 4;
  const int parts = static_cast<int>(device::grid_size());
  int next = static_cast<int>(device::block_index()), loaded = 0;
  for (int turn = 0; turn < loaded || next < a.tiles; ++turn) {
#pragma unroll 1  // one place that loads: a second one costs registers
    for (; loaded < turn + a.stages && next < a.tiles; ++loaded, next += parts) {
      load(next, shared + (loaded & (a.stages - 1)) * a.stage_bytes);
    }
    if (loaded > turn + 1) {
      device::wait_for_copies<1>();
    } else {
      device::wait_for_copies<0>();
    }
    device::sync_block();
    const unsigned char* stage = shared + (turn & (a.stages - 1)) * a.stage_bytes;
    for (int step = group; step < steps; step += groups) {
      const int y = step >> steps_across_log2, x = (step - (y << steps_across_log2)) * kStep;
      const unsigned char* g = stage + a.gradient_at + ((y << a.tile_width_log2) + x) * a.g.pitch;
      const unsigned char* in = stage + ((y * a.x.stride + tap_row) * a.x.in_tile_width + x * a.x.stride) * a.x.pitch;
      multiplier.step(g, in, sums, bias_sums);
    }
    device::sync_block();
  }

  const int64_t part = device::block_index() * groups + group;
  const int row = lane >> 2, pair = (lane & 3) * 2;
  if (a.weight) {
    const int block_products = a.taps_across > 1 ? 9 : a.blocks_at_once;
    // Rows of blocks number the second dimension of the grid completely, which has no primitive of its own.
    const int grid_rows = a.rows_across * ((a.gradient.channels + kBlock - 1) / kBlock);
    float* out = a.partial +
                 ((part * grid_rows + device::block_row()) * block_products + tap_row * kProducts) * (kBlock * kBlock);
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      if (k >= multiplier.products) continue;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          if (m >= multiplier.rows || n >= multiplier.columns) continue;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            device::store_global(
                out + (k * kBlock + m * 16 + row + 8 * h) * kBlock + n * 8 + pair,
                U32x2{device::float_bits(sums[k][m][n][2 * h]), device::float_bits(sums[k][m][n][2 * h + 1])});
          }
        }
      }
    }
  }
  if (multiplier.bias) {
    const int padded = (a.gradient.channels + kBlock - 1) / kBlock * kBlock;
    float* out = a.partial_bias + part * padded + row_of_blocks * kBlock + row;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= multiplier.rows) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = bias_sums[m][2 * h];
        if constexpr (sizeof(Value) == 4) {  // of a quarter of the pixels
          sum += device::shuffle_xor(sum, 1);
          sum += device::shuffle_xor(sum, 2);
        }
        if (pair == 0) device::store_global(out + m * 16 + 8 * h, sum);
      }
    }
  }
}

// ---- the sum of all parts ---------------------------------------------------------------------------------------

constexpr int kStrands = 8;  // that divide the parts of one sum among themselves

struct SumArgs {
  int32_t channels[kMostInputs];
  int32_t inputs;
  int32_t out_channels;
  int32_t taps_across;
  int32_t block_products, blocks_at_once, rows_across, grid_rows;
  int32_t parts;
  const float* partial;
  const float* partial_bias;
  WeightView weight, bias;
  int64_t weight_blocks;  // of the grid; the rest are the bias'
};

// One block for kBlock neighbouring sums: a lane for each, a warp for each strand.
ESR_KERNEL(kStrands * 32, 1) sum_kernel(ESR_ARGUMENT(SumArgs) a) {
  const int lane = device::thread_index() & 31, strand = device::thread_index() >> 5;
  const int64_t block = device::block_index();
  const float* from;
  int64_t pitch;
  int o, channel = 0, tap = 0;
  bool exists;
  const bool is_weight = block < a.weight_blocks;
  if (is_weight) {
    const int64_t rest = block / kBlock;
    const int product = static_cast<int>(rest % a.block_products), grid_row = static_cast<int>(rest / a.block_products);
    o = grid_row / a.rows_across * kBlock + static_cast<int>(block % kBlock);
    if (a.taps_across > 1) tap = product;
    int index = grid_row % a.rows_across * a.blocks_at_once + (a.taps_across > 1 ? 0 : product);
    int input = 0;
    for (; input < a.inputs; ++input) {
      const int blocks = (a.channels[input] + kBlock - 1) / kBlock;
      if (index < blocks) break;
      index -= blocks;
      channel += a.channels[input];
    }
    const int i = index * kBlock + lane;
    exists = o < a.out_channels && input < a.inputs && i < a.channels[input];
    channel += i;  // among those of all inputs
    pitch = int64_t{a.grid_rows} * a.block_products * (kBlock * kBlock);
    from = a.partial + block * kBlock + lane;
  } else {
    o = static_cast<int>(block - a.weight_blocks) * kBlock + lane;
    exists = o < a.out_channels;
    pitch = (a.out_channels + kBlock - 1) / kBlock * int64_t{kBlock};
    from = a.partial_bias + o;
  }
  device::wait_for_previous_grid();
  device::allow_next_grid();
  float sum = 0.0f;
  if (exists) {
#pragma unroll 8
    for (int part = strand; part < a.parts; part += kStrands) sum += device::load_global<float>(from + part * pitch);
  }
  auto* strands = reinterpret_cast<float*>(device::shared_memory());
  device::store_shared(strands + strand * 32 + lane, sum);
  device::sync_block();
  if (strand > 0 || !exists) return;
  for (int s = 1; s < kStrands; ++s) sum += device::load_shared<float>(strands + s * 32 + lane);
  if (is_weight) {
    write_weight(a.weight, o, channel, tap, sum);
  } else {
    write_weight(a.bias, o, 0, 0, sum);
  }
}

// ---- on the host ------------------------------------------------------------------------------------------------

struct Division {
  WeightGradientArgs args = {};
  int64_t parts = 0;
  int32_t grid_rows = 0, block_products = 0, groups = 0;
  int64_t partial_floats() const { return parts * groups * grid_rows * block_products * kBlock * kBlock; }
};

// Everything that follows from the sizes, but for the number of stages. It must not depend on the device: sums in
// another order would be other results.
Division divide(const WeightGradient& w) {
  Division d;
  WeightGradientArgs& a = d.args;
  const auto bytes = static_cast<int32_t>(value_bytes(w.precision));
  const bool halves = bytes == 2;
  const int32_t unit_channels = kUnitBytes / bytes;
  a.taps_across = w.taps == 9 ? 3 : 1;
  a.weight = w.weight.data != nullptr;
  int32_t most_channels = 0;
  STD_TORCH_CHECK(w.inputs.size() <= kMostInputs, "a weight gradient of ", w.inputs.size(), " inputs");
  for (size_t i = 0; i < w.inputs.size(); ++i) {
    a.inputs[i] = w.inputs[i];
    a.input_blocks += static_cast<int32_t>(ceil_div(w.inputs[i].channels, kBlock));
    most_channels = std::max(most_channels, std::min(w.inputs[i].channels, kBlock));
  }
  const int32_t most_blocks = a.taps_across > 1 ? 1 : kProducts;
  a.rows_across = static_cast<int32_t>(ceil_div(a.input_blocks, most_blocks));
  a.blocks_at_once = static_cast<int32_t>(ceil_div(a.input_blocks, a.rows_across));
  d.block_products = a.taps_across > 1 ? 9 : a.blocks_at_once;
  d.groups = kWarps / a.taps_across;
  a.gradient = w.gradient;
  d.grid_rows = a.rows_across * static_cast<int32_t>(ceil_div(w.gradient.channels, kBlock));

  // Of 16 or 32 pixels a row, whichever covers the image with fewer tiles.
  const int32_t pixels = halves ? 192 : 96;
  int64_t fewest = -1;
  for (const int32_t other : {0, 1}) {
    const int32_t width_log2 = (halves ? 5 : 4) ^ other;
    const int32_t height = pixels >> width_log2;
    const int64_t across = ceil_div(w.out_width, int64_t{1} << width_log2), down = ceil_div(w.out_height, height);
    if (fewest >= 0 && across * down >= fewest) continue;
    fewest = across * down;
    a.tile_height = height;
    a.tile_width_log2 = width_log2;
    a.tiles_across = static_cast<int32_t>(across);
    a.tiles_down = static_cast<int32_t>(down);
  }
  const int64_t tiles = w.batch * fewest;
  STD_TORCH_CHECK(tiles < INT32_MAX / 2, "a weight gradient of ", w.batch, " images of ", w.out_height, "x",
                  w.out_width, " is too large for one launch");
  a.tiles = static_cast<int32_t>(tiles);
  constexpr int64_t kBlocks = 256, kLeastParts = 16;
  const int64_t most_parts = std::min(tiles, std::max(kBlocks / d.grid_rows, kLeastParts));
  d.parts = ceil_div(tiles, ceil_div(tiles, most_parts));

  // Fragments' rows fall on different banks: for ldmatrix an odd number of units from pixel to pixel, for 32-bit
  // values an odd number of pairs.
  const auto pitch = [&](int32_t channels, int32_t multiple) {
    const auto units = static_cast<int32_t>(round_up(channels, multiple) / unit_channels);
    return (halves ? units | 1 : (units + 1) / 4 * 4 + 2) * kUnitBytes;
  };
  const int32_t tile_width = 1 << a.tile_width_log2;
  a.g.height = w.out_height;
  a.g.width = w.out_width;
  a.g.in_tile_height = a.tile_height;
  a.g.in_tile_width = tile_width;
  a.g.stride = 1;
  a.g.pitch = pitch(std::min(w.gradient.channels, kBlock), 16);
  a.x.height = w.height;
  a.x.width = w.width;
  a.x.in_tile_height = (a.tile_height - 1) * w.stride + a.taps_across;
  a.x.in_tile_width = (tile_width - 1) * w.stride + a.taps_across;
  a.x.stride = w.stride;
  a.x.padding = w.padding;
  a.x.reflect = w.reflect;
  a.x.pitch = pitch((a.blocks_at_once - 1) * kBlock + most_channels, 16);
  a.gradient_at = a.x.in_tile_height * a.x.in_tile_width * a.x.pitch;
  a.stage_bytes = a.gradient_at + a.tile_height * tile_width * a.g.pitch;
  return d;
}

// Two blocks on a multiprocessor before two stages.
int32_t stages(int32_t stage_bytes) {
  const device::Properties& gpu = device::properties();
  constexpr int kReserved = 1024, kMostResident = 2;
  const auto resident = [&](int n) {
    if (n * stage_bytes > gpu.shared_bytes) return 0;
    return std::min(kMostResident, gpu.shared_bytes_in_all / (n * stage_bytes + kReserved));
  };
  return resident(2) > 0 && resident(2) == resident(1) ? 2 : 1;
}

}  // namespace

int64_t weight_gradient_bytes(const WeightGradient& w) {
  const Division d = divide(w);
  return (d.partial_floats() + d.parts * d.groups * round_up(w.gradient.channels, kBlock)) * 4;
}

void launch_weight_gradient(const WeightGradient& w, unsigned char* workspace, device::Stream stream, bool overlap) {
  Division d = divide(w);
  WeightGradientArgs& a = d.args;
  a.partial = reinterpret_cast<float*>(workspace);
  a.partial_bias = w.bias.data == nullptr ? nullptr : a.partial + d.partial_floats();
  a.stages = stages(a.stage_bytes);
  device::LaunchShape shape;
  shape.blocks = d.parts;
  shape.rows = d.grid_rows;
  shape.threads = kThreads;
  shape.shared_bytes = a.stages * a.stage_bytes;
  switch (w.precision) {
    case Precision::kFloat16:
      device::launch("weight_gradient_float16", &weight_gradient_kernel<Float16>, shape, stream, overlap, a);
      break;
    case Precision::kBFloat16:
      device::launch("weight_gradient_bfloat16", &weight_gradient_kernel<BFloat16>, shape, stream, overlap, a);
      break;
    case Precision::kTf32:
      device::launch("weight_gradient_tf32", &weight_gradient_kernel<Tf32>, shape, stream, overlap, a);
      break;
    case Precision::kTf32x3:
      device::launch("weight_gradient_tf32x3", &weight_gradient_kernel<Tf32x3>, shape, stream, overlap, a);
      break;
  }
  SumArgs s = {};
  for (size_t i = 0; i < w.inputs.size(); ++i) s.channels[i] = w.inputs[i].channels;
  s.inputs = static_cast<int32_t>(w.inputs.size());
  s.out_channels = w.gradient.channels;
  s.taps_across = a.taps_across;
  s.block_products = d.block_products;
  s.blocks_at_once = a.blocks_at_once;
  s.rows_across = a.rows_across;
  s.grid_rows = d.grid_rows;
  s.parts = static_cast<int32_t>(d.parts * d.groups);
  s.partial = a.partial;
  s.partial_bias = a.partial_bias;
  s.weight = w.weight;
  s.bias = w.bias;
  s.weight_blocks = a.weight ? int64_t{d.grid_rows} * d.block_products * kBlock : 0;
  device::LaunchShape sum_shape;
  sum_shape.blocks = s.weight_blocks + (w.bias.data == nullptr ? 0 : ceil_div(w.gradient.channels, kBlock));
  sum_shape.threads = kStrands * 32;
  sum_shape.shared_bytes = kStrands * 32 * 4;
  device::launch("weight_gradient_sum", &sum_kernel, sum_shape, stream, true, s);
}

}  // namespace esr::cuda
