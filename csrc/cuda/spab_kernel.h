// SPAN's block in one launch. A block of threads loads a tile with a margin of three pixels, and computes the first
// convolution with a margin of two, the second with one, the third with none; the maps between them stay in shared
// memory, rounded as they would be elsewhere. Every product and sum is that of three launches, in the same order.
#pragma once

#include <utility>

#include "convolution_kernel.h"
#include "spab.h"

namespace esr::cuda {

// Where in a tile one of the three convolutions has results, counted row by row.
struct Region {
  int margin, width, pixels, reciprocal;
};

ESR_DEVICE Region region_of(const SpabArgs& a, int k) {
  const int margin = 2 - k, width = (1 << a.last.tile_width_log2) + 2 * margin;
  return {margin, width, (a.last.tile_height + 2 * margin) * width, 65536 / width + 1};
}

// For each convolution, where the units of every step lie, seen from the pixel of the first tap.
ESR_DEVICE void write_tables(const SpabArgs& a, unsigned char* shared) {
  const Packing& p = a.packing;
  const int count = 2 * a.steps;
  for (int i = device::thread_index(); i < 3 * count; i += device::thread_count()) {
    const int k = i / count, entry = i - k * count;
    const Packing::Slab slab = p.slab_of(entry / 2);
    const int q = 2 * slab.step + (entry & 1), tap = q / slab.units, dy = tap / 3, dx = tap - dy * 3;
    const int unit = slab.first_unit + q - tap * slab.units, pixel = dy * (region_of(a, k).width + 2) + dx;
    device::store_shared<int>(shared + a.tables_at + i * 4,
                              tap < 9 ? pixel * a.last.pitch + unit * kUnitBytes : kLastTap);
  }
  if (device::thread_index() == 0) device::store_shared(shared + a.zeros_at, U32x4{0, 0, 0, 0});
}

// Where a convolution's operands lie in shared memory, seen from its input.
struct Offsets {
  int table_at, weights_at, zeros_at;
};

// The sums of this warp's pixels of a region.
template <typename P, int kN, int kM>
ESR_DEVICE void multiply_region(const SpabArgs& a, const Region& r, const Offsets& offsets, const unsigned char* pixels,
                                const float* bias, float (&sums)[kM][kN][4]) {
  const int lane = device::thread_index() & 31, first = (device::thread_index() >> 5) * kM * 16;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float* own = bias + n * 8 + (lane & 3) * 2;
    const float b0 = device::load_global<float>(own), b1 = device::load_global<float>(own + 1);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      sums[m][n][0] = sums[m][n][2] = b0;
      sums[m][n][1] = sums[m][n][3] = b1;
    }
  }
  if (first >= r.pixels) return;
  int base[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int q = first + m * 16 + (lane & 15), i = q < r.pixels ? q : 0, y = divided(i, r.reciprocal);
    base[m] = (y * (r.width + 2) + i - y * r.width) * a.last.pitch;
  }
  multiply_slab<P, kN, kM>(offsets, a.steps, pixels, base, sums);
}

// The map between two convolutions; around the image it is what their padding is, zeros.
template <typename Value, int kN, int kM>
ESR_DEVICE void keep_region(const SpabArgs& a, const Region& r, const Tile& tile, const float (&sums)[kM][kN][4],
                            unsigned char* pixels) {
  const int lane = device::thread_index() & 31, first = (device::thread_index() >> 5) * kM * 16;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int q = first + m * 16 + 8 * h + (lane >> 2), row = divided(q, r.reciprocal);
      if (q >= r.pixels) continue;
      const int y = tile.y - r.margin + row, x = tile.x - r.margin + q - row * r.width;
      const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.last.height) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(a.last.width);
      float values[2 * kN];
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) values[i] = sums[m][i / 2][2 * h + i % 2];
      activate(values, Activation::kSilu, 0.0f);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        device::store_shared<uint32_t>(pixels + q * a.last.pitch + n * kUnitBytes + (lane & 3) * 4,
                                       inside ? device::pack_pair<Value>(values[2 * n], values[2 * n + 1]) : 0);
      }
    }
  }
}

// The tile's part of the first convolution's results.
template <typename Value, int kN>
ESR_DEVICE void write_middle(const SpabArgs& a, const Tile& tile, const unsigned char* pixels) {
  const Region r = region_of(a, 0);
  write_tile<Value, kN>(a.last, a.middle, a.middle_channels, tile, [&](int row, int column) {
    return pixels + ((row + r.margin) * r.width + column + r.margin) * a.last.pitch;
  });
}

template <typename P, int kN, bool kLarge>
ESR_DEVICE void compute_spab(const SpabArgs& a) {
  using Value = typename P::Value;
  unsigned char* const shared = device::shared_memory();
  unsigned char* const inner = shared + a.inner_at;
  const int weight_bytes = a.steps * a.packing.step_bytes();
  const auto weights_at = [&](int k) { return a.weights_at + (a.weights_stay ? k * weight_bytes : 0); };
  const auto load_weights_of = [&](int k) {
    unsigned char* const to = shared + weights_at(k);
    for (int i = device::thread_index() * 16; i < weight_bytes; i += device::thread_count() * 16) {
      device::copy_async<16>(to + i, a.weights[k] + i, true);
    }
  };
  const auto offsets = [&](int k, int pixels_at) -> Offsets {
    return {a.tables_at + k * a.steps * 8 - pixels_at, weights_at(k) - pixels_at, a.zeros_at - pixels_at};
  };

  write_tables(a, shared);
  for (int k = 0; k < (a.weights_stay ? 3 : 1); ++k) load_weights_of(k);
  device::commit_copies();
  device::wait_for_previous_grid();
  device::allow_next_grid();

  const auto tiles = static_cast<uint32_t>(a.last.tiles), blocks = static_cast<uint32_t>(device::grid_size());
  auto t = static_cast<uint32_t>(device::block_index());
  Tile tile = {};
  float sums[spab_rows<kLarge>(2)][kN][4];
  for (bool first = true;; first = false) {
    // A tile is loaded while the one before is finished.
    const bool more = t < tiles;
    const Tile next = locate(a.last, static_cast<int>(t));
    if (more) {
      if (!first && !a.weights_stay) load_weights_of(0);
      load_input<Value>(a.last, a.last.inputs[0], next, 0, kN, shared);
      device::commit_copies();
    }
    if (!first) {
      constexpr int kRows = spab_rows<kLarge>(2);
      store_results<P, kN, kRows, Variant::kForward>(a.last, tile, 0, sums, inner, PixelsInRows<kRows>{a.last, tile});
    }
    if (!more) break;
    tile = next;
    t += blocks;
    device::wait_for_copies<0>();
    device::sync_block();
    {
      const Region r = region_of(a, 0);
      float inner_sums[spab_rows<kLarge>(0)][kN][4];
      multiply_region<P, kN>(a, r, offsets(0, 0), shared, a.bias[0], inner_sums);
      if (!a.weights_stay) {
        device::sync_block();
        load_weights_of(1);
        device::commit_copies();
      }
      keep_region<Value, kN>(a, r, tile, inner_sums, inner);
    }
    device::wait_for_copies<0>();
    device::sync_block();
    if (a.middle.data != nullptr) write_middle<Value, kN>(a, tile, inner);
    {
      const Region r = region_of(a, 1);
      float inner_sums[spab_rows<kLarge>(1)][kN][4];
      multiply_region<P, kN>(a, r, offsets(1, a.inner_at), inner, a.bias[1], inner_sums);
      if (!a.weights_stay) {
        device::sync_block();
        load_weights_of(2);
        device::commit_copies();
      }
      keep_region<Value, kN>(a, r, tile, inner_sums, shared);
    }
    device::wait_for_copies<0>();
    device::sync_block();
    multiply_region<P, kN>(a, region_of(a, 2), offsets(2, 0), shared, a.bias[2], sums);
    device::sync_block();
  }
}

inline constexpr int kSpabThreads = 256;

template <typename P, int kN>
ESR_KERNEL(kSpabThreads, kN <= 4 ? 2 : 1)
spab_kernel(ESR_ARGUMENT(SpabArgs) a) {
  compute_spab<P, kN, false>(a);
}
template <typename P, int kN>
ESR_KERNEL(kSpabThreads, 1)
spab_large_kernel(ESR_ARGUMENT(SpabArgs) a) {
  compute_spab<P, kN, true>(a);
}

template <typename P, int... kIndex>
auto spab_instance(const Spab& spab, std::integer_sequence<int, kIndex...>) {
  constexpr int kFirst = kFewestSpabTiles, kLast = kMostLargeTiles;
  constexpr void (*kSmall[])(SpabArgs) = {&spab_kernel<P, kFirst + kIndex>...};
  constexpr void (*kLarge[])(SpabArgs) = {
      &spab_large_kernel<P, (kFirst + kIndex < kLast ? kFirst + kIndex : kLast)>...};
  return (spab.large ? kLarge : kSmall)[spab.shape.instance - kFirst];
}

template <typename P>
void launch_spab_instance(const char* name, const Spab& spab, device::Stream stream, bool overlap) {
  const auto kernel = spab_instance<P>(spab, std::make_integer_sequence<int, kMostTiles - kFewestSpabTiles + 1>());
  device::launch(name, kernel, spab.shape, stream, overlap, spab.args);
}

}  // namespace esr::cuda
