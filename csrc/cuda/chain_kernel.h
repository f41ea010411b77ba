// A chain of convolutions in one launch. Each block keeps its tile in shared memory from layer to layer; only the
// pixels along its border travel through device memory to the blocks around it, which a flag tells that they are there.
// Every product and sum is that of one launch per layer, in the same order.
#pragma once

#include <utility>

#include "chain.h"
#include "convolution_kernel.h"
#include "cooperative.h"

namespace esr::cuda {

inline constexpr int kChainRows = 4;  // products of 16 pixels that a warp computes at once: all of a tile's

// The tile's pixels are numbered along its border first, so that the first products of all warps are what others wait
// for.
ESR_DEVICE int border_pixels(const ChainArgs& a) { return (2 << a.tile_width_log2) + 2 * (a.tile_height - 2); }

ESR_DEVICE Pixel numbered(const ChainArgs& a, int q) {
  const int width = 1 << a.tile_width_log2, height = a.tile_height;
  if (q < width) return {0, q};
  if (q < 2 * width) return {height - 1, q - width};
  q -= 2 * width;
  if (q < height - 2) return {q + 1, 0};
  q -= height - 2;
  if (q < height - 2) return {q + 1, width - 1};
  q -= height - 2;
  const int row = divided(q, 65536 / (width - 2) + 1);
  return {row + 1, q - row * (width - 2) + 1};
}

ESR_DEVICE void write_places(const ChainArgs& a, unsigned char* shared) {
  const int pixels = a.tile_height << a.tile_width_log2;
  for (int q = device::thread_index(); q < pixels; q += device::thread_count()) {
    const Pixel p = numbered(a, q);
    device::store_shared<int>(shared + a.places_at + q * 4, p.y << 8 | p.x);
  }
}

ESR_DEVICE Pixel place_of(const ChainArgs& a, const unsigned char* shared, int q) {
  const int place = device::load_shared<int>(shared + a.places_at + q * 4);
  return {place >> 8, place & 255};
}

ESR_DEVICE bool inside(const ChainArgs& a, int y, int x) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(a.height) &&
         static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
}

ESR_DEVICE Packing chain_packing(const ChainArgs& a) {
  Packing p;
  p.units[0] = a.units;
  p.slab_units = a.slab_units;
  return p;
}

// Where the units of every step lie, seen from the pixel of the first tap: of 3x3 convolutions, then of 1x1 ones.
ESR_DEVICE void write_chain_tables(const ChainArgs& a, unsigned char* shared) {
  const Packing p = chain_packing(a);
  const int large = 2 * p.total_steps(), small = 2 * Packing::steps(1, a.units);
  for (int i = device::thread_index(); i < large + small; i += device::thread_count()) {
    int offset = kLastTap;
    if (i < large) {
      const Packing::Slab slab = p.slab_of(i / 2);
      const int q = 2 * slab.step + (i & 1), tap = q / slab.units, dy = tap / 3, dx = tap - dy * 3;
      const int unit = slab.first_unit + q - tap * slab.units;
      if (tap < 9) offset = (dy * a.in_tile_width + dx) * a.pitch + unit * kUnitBytes;
    } else if (i - large < a.units) {
      offset = (a.in_tile_width + 1) * a.pitch + (i - large) * kUnitBytes;
    }
    device::store_shared<int>(shared + a.tables_at + i * 4, offset);
  }
  if (device::thread_index() == 0) device::store_shared(shared + a.zeros_at, U32x4{0, 0, 0, 0});
}

// Where a layer's operands lie in shared memory, seen from its input.
struct ChainOperands {
  int table_at, weights_at, zeros_at;
};

// A layer's results of products [first, last) of every warp, rounded, where the next layer reads them; around the image
// they are what padding is, zeros.
template <typename Value, int kN>
ESR_DEVICE void keep_results(const ChainArgs& a, const ChainLayer& layer, const Tile& tile, int first, int last,
                             const float (&sums)[kChainRows][kN][4], unsigned char* shared) {
  const int lane = device::thread_index() & 31, warp = device::thread_index() >> 5;
  const int warps = device::thread_count() >> 5, pair = (lane & 3) * 4;
  const unsigned char* const residual_image = layer.residual.data + tile.image * layer.residual.image;
#pragma unroll 1
  for (int half = 2 * first; half < 2 * last; ++half) {  // eight pixels, two channels of every tile in a lane
    float values[2 * kN], residual[2 * kN] = {};
#pragma unroll
    for (int i = 0; i < 2 * kChainRows; ++i) {  // unrolled, so that sums stay in registers
      if (i != half) continue;
#pragma unroll
      for (int k = 0; k < 2 * kN; ++k) values[k] = sums[i / 2][k / 2][2 * (i % 2) + k % 2];
    }
    const Pixel p = place_of(a, shared, ((half >> 1) * warps + warp) * 16 + 8 * (half & 1) + (lane >> 2));
    const int at = ((p.y + 1) * a.in_tile_width + p.x + 1) * a.pitch + pair, y = tile.y + p.y, x = tile.x + p.x;
    const bool real = inside(a, y, x);
    if (layer.residual_at >= 0) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        device::unpack_pair<Value>(device::load_shared<uint32_t>(shared + layer.residual_at + at + n * kUnitBytes),
                                   residual[2 * n], residual[2 * n + 1]);
      }
    } else if (layer.residual.data != nullptr && real) {
      const unsigned char* from = residual_image + y * layer.residual.row + x * layer.residual.pixel + pair;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        device::unpack_pair<Value>(device::load_global<uint32_t>(from + n * kUnitBytes), residual[2 * n],
                                   residual[2 * n + 1]);
      }
    }
    finish(values, residual, layer.activation, layer.slope, layer.residual_mode);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      device::store_shared<uint32_t>(shared + layer.to_at + at + n * kUnitBytes,
                                     real ? device::pack_pair<Value>(values[2 * n], values[2 * n + 1]) : 0);
    }
  }
}

ESR_DEVICE unsigned char* ring_pixel(const ChainArgs& a, int exchange, const Tile& tile, int y, int x) {
  return a.ring.data + (exchange & 1) * a.ring_bytes + tile.image * a.ring.image + y * a.ring.row + x * a.ring.pixel;
}

// The tile's border to device memory.
template <int kN>
ESR_DEVICE void publish_border(const ChainArgs& a, const ChainLayer& layer, const Tile& tile,
                               const unsigned char* shared) {
  for (int i = device::thread_index(); i < border_pixels(a) * kN; i += device::thread_count()) {
    const int q = i / kN, n = i - q * kN;
    const Pixel p = place_of(a, shared, q);
    const int y = tile.y + p.y, x = tile.x + p.x;
    if (!inside(a, y, x)) continue;
    const int at = ((p.y + 1) * a.in_tile_width + p.x + 1) * a.pitch + n * kUnitBytes;
    device::store_global(ring_pixel(a, layer.exchange, tile, y, x) + n * kUnitBytes,
                         device::load_shared<U32x4>(shared + layer.to_at + at));
  }
}

// The pixels around the tile, which the blocks around have published; outside of the image, zeros.
template <int kN>
ESR_DEVICE void load_border(const ChainArgs& a, const ChainLayer& layer, const Tile& tile, unsigned char* shared) {
  const int width = a.in_tile_width, height = a.in_tile_height, count = 2 * width + 2 * (height - 2);
  for (int i = device::thread_index(); i < count * kN; i += device::thread_count()) {
    const int q = i / kN, n = i - q * kN, side = q - 2 * width;
    const int row = q < width ? 0 : q < 2 * width ? height - 1 : 1 + (side >> 1);
    const int column = q < width ? q : q < 2 * width ? q - width : (side & 1) * (width - 1);
    const int y = tile.y - 1 + row, x = tile.x - 1 + column;
    const bool real = inside(a, y, x);
    const unsigned char* from = real ? ring_pixel(a, layer.exchange, tile, y, x) + n * kUnitBytes : a.ring.data;
    device::copy_async<16>(shared + layer.to_at + (row * width + column) * a.pitch + n * kUnitBytes, from, real);
  }
}

// Waits, in one thread for each of up to eight blocks around, until they have published as many borders.
ESR_DEVICE void wait_for_neighbours(const ChainArgs& a, const ChainLayer& layer, int block) {
  if (device::thread_index() >= 9 || device::thread_index() == 4) return;
  const int dy = device::thread_index() / 3 - 1, dx = device::thread_index() % 3 - 1;
  const int in_image = block % (a.tiles_across * a.tiles_down);
  const int row = in_image / a.tiles_across + dy, column = in_image % a.tiles_across + dx;
  if (row < 0 || row >= a.tiles_down || column < 0 || column >= a.tiles_across) return;
  const int flag = (block + dy * a.tiles_across + dx) * (kFlagBytes / 4);
  device::wait_for_flag(a.flags + flag, static_cast<uint32_t>(layer.exchange));
}

// The tile's results to where others read them.
template <typename Value, int kN>
ESR_DEVICE void write_layer(const ChainArgs& a, const ChainLayer& layer, const Tile& tile,
                            const unsigned char* shared) {
  write_tile<Value, kN>(a, layer.output, layer.out_channels, tile, [&](int row, int column) {
    return shared + layer.to_at + ((row + 1) * a.in_tile_width + column + 1) * a.pitch;
  });
}

// Two blocks would not fit into shared memory. Of 512 threads' registers the sums of 32 channels spill a few.
constexpr int most_chain_threads(int channel_tiles) { return channel_tiles <= 4 ? 384 : 256; }

template <typename P, int kN>
ESR_KERNEL(most_chain_threads(kN), 1)
chain_kernel(ESR_ARGUMENT(ChainArgs) a) {
  using Value = typename P::Value;
  constexpr int kStepBytes = kN * 32 * P::kWeights * 4;
  unsigned char* const shared = device::shared_memory();
  const int lane = device::thread_index() & 31, warp = device::thread_index() >> 5;
  const int warps = device::thread_count() >> 5;
  const int large_steps = chain_packing(a).total_steps(), small_steps = Packing::steps(1, a.units);
  // Of the products that every warp computes, those with pixels of the border.
  const int border_rows = (border_pixels(a) + 16 * warps - 1) / (16 * warps);
  const auto block = static_cast<int>(device::block_index());
  const Tile tile = locate(a, block);
  const auto weights_at = [&](int l) { return a.weights_at + (l & 1) * a.weights_bytes; };
  const auto load_layer = [&](int l) {
    const int bytes = (a.layers[l].taps == 9 ? large_steps : small_steps) * kStepBytes + kN * 8 * 4;
    for (int i = device::thread_index() * 16; i < bytes; i += device::thread_count() * 16) {
      device::copy_async<16>(shared + weights_at(l) + i, a.layers[l].weights + i, true);
    }
  };

  load_layer(0);
  load_input<Value>(a, a.input, tile, 0, kN, shared + a.layers[0].from_at);
  device::commit_copies();
  write_places(a, shared);
  write_chain_tables(a, shared);
  device::wait_for_copies<0>();
  device::sync_block();

#pragma unroll 1
  for (int l = 0;; ++l) {
    const ChainLayer& layer = a.layers[l];
    const bool last = l + 1 == a.layer_count, large = layer.taps == 9;
    const int steps = large ? large_steps : small_steps;
    if (!last) load_layer(l + 1);
    device::commit_copies();

    // Of this lane's row of each product's left operand, at the first tap; in a register only while it is needed.
    int base[kChainRows];
#pragma unroll
    for (int m = 0; m < kChainRows; ++m) {
      const Pixel p = place_of(a, shared, (m * warps + warp) * 16 + (lane & 15));
      base[m] = (p.y * a.in_tile_width + p.x) * a.pitch;
    }
    float sums[kChainRows][kN][4];
    const unsigned char* bias = shared + weights_at(l) + steps * kStepBytes + (lane & 3) * 8;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const U32x2 b = device::load_shared<U32x2>(bias + n * 32);
#pragma unroll
      for (int m = 0; m < kChainRows; ++m) {
        sums[m][n][0] = sums[m][n][2] = device::bits_float(b.x);
        sums[m][n][1] = sums[m][n][3] = device::bits_float(b.y);
      }
    }
    const ChainOperands operands{a.tables_at + (large ? 0 : large_steps * 8) - layer.from_at,
                                 weights_at(l) - layer.from_at, a.zeros_at - layer.from_at};
    multiply_slab<P, kN, kChainRows>(operands, steps, shared + layer.from_at, base, sums);

    // The border first: it travels while the rest is finished.
    const int early = layer.exchange > 0 ? border_rows : 0;
    if (early > 0) {
      keep_results<Value, kN>(a, layer, tile, 0, early, sums, shared);
      device::sync_block();
      publish_border<kN>(a, layer, tile, shared);
      device::sync_block();
      if (device::thread_index() == 0) {
        device::set_flag(a.flags + block * (kFlagBytes / 4), static_cast<uint32_t>(layer.exchange));
      }
    }
    keep_results<Value, kN>(a, layer, tile, early, kChainRows, sums, shared);
    if (layer.output.data != nullptr) {
      device::sync_block();
      write_layer<Value, kN>(a, layer, tile, shared);
    }
    if (last) break;
    if (early > 0) {
      wait_for_neighbours(a, layer, block);
      device::sync_block();
      load_border<kN>(a, layer, tile, shared);
      device::commit_copies();
    }
    device::wait_for_copies<0>();
    device::sync_block();
  }
}

template <typename P, int... kIndex>
auto chain_instance(int channel_tiles, std::integer_sequence<int, kIndex...>) {
  constexpr void (*kInstances[])(ChainArgs) = {&chain_kernel<P, kFewestChainTiles + kIndex>...};
  return kInstances[channel_tiles - kFewestChainTiles];
}

template <typename P>
auto chain_instance(const device::LaunchShape& shape) {
  return chain_instance<P>(shape.instance, std::make_integer_sequence<int, kMostChainTiles - kFewestChainTiles + 1>());
}

}  // namespace esr::cuda
