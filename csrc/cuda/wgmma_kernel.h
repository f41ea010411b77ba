// A 3x3 convolution by wgmma. Warpgroups of a block share its weights and have tiles of their own; they issue products
// in turns, and while one's are under way, the others load and finish.
#pragma once

#include <utility>

#include "convolution_kernel.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace esr::cuda {

constexpr int kWgmmaGroupThreads = 128;
// Named barriers: of one warpgroup's turn, and of its threads.
constexpr int turn_barrier(int group) { return 1 + group; }
constexpr int group_barrier(int group) { return 1 + kMostWgmmaGroups + group; }

// Brings a tile's input pixels to a stage, unit by unit: all pixels' first ones, then all second ones. The threads are
// those of one warpgroup.
template <typename Value>
ESR_DEVICE void load_planes(const WgmmaArgs& a, const Tile& tile, unsigned char* stage) {
  const ConvolutionArgs& c = a.convolution;
  const View& v = c.inputs[0];
  constexpr int kChannels = kUnitBytes / sizeof(Value), kPixels = kWgmmaInputHeight * kWgmmaInputWidth;
  const int thread = device::thread_index() % kWgmmaGroupThreads, units = a.packing.units;
  const unsigned char* image = v.data + tile.image * v.image;
  // Neighbouring threads take what lies side by side in memory.
  const bool planar = !v.blocked && v.channel != static_cast<int64_t>(sizeof(Value));
  const int reciprocal = 65536 / units + 1;
  for (int i = thread; i < kPixels * units; i += kWgmmaGroupThreads) {
    const int pixel = planar ? i % kPixels : divided(i, reciprocal);
    const int unit = planar ? i / kPixels : i - pixel * units;
    const int y = mirrored(tile.y - 1 + pixel / kWgmmaInputWidth, c.height, c.reflect);
    const int x = mirrored(tile.x - 1 + pixel % kWgmmaInputWidth, c.width, c.reflect);
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(c.height) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(c.width);
    const unsigned char* from = image + y * v.row + x * v.pixel;
    unsigned char* to = stage + unit * a.plane_bytes + pixel * kUnitBytes;
    if (v.blocked) {
      device::copy_async<16>(to, inside ? from + unit * kUnitBytes : v.data, inside);
    } else {
      U32x4 value = {0, 0, 0, 0};
      if (inside) value = gather_unit<Value>(v, from, unit * kChannels, c.shift, c.scale);
      device::store_shared(to, value);
    }
  }
}

// Issues a tile's products, which add to the sums.
template <typename P, int kN>
ESR_DEVICE void multiply_planes(const WgmmaArgs& a, const unsigned char* stage, const unsigned char* weights,
                                float (&sums)[kWgmmaProducts][kN][4]) {
  // A row of eight pixels is a group; the next one is a row of the tile further. Weights: eight output channels.
  const uint64_t pixels = device::matrix_descriptor(stage, 0, kWgmmaInputWidth * kUnitBytes);
  uint64_t b = device::matrix_descriptor(weights, kN * 8 * kUnitBytes, 8 * kUnitBytes);
  const int steps = a.packing.steps();
  device::fence_products(sums);
#pragma unroll 3
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int m = 0; m < kWgmmaProducts; ++m) {
      device::multiply_add_async<typename P::Product, kN>(sums[m], pixels + a.offsets[step] + m * 8, b);
    }
    b += 2 * kN * 8 * kUnitBytes / 16;
  }
  device::commit_products();
}

template <typename P, int kN, Variant kVariant>
ESR_KERNEL(kMostWgmmaGroups* kWgmmaGroupThreads, 1)
wgmma_kernel(ESR_ARGUMENT(WgmmaArgs) a) {
  using Value = typename P::Value;
  const ConvolutionArgs& c = a.convolution;
  unsigned char* const shared = device::shared_memory();
  unsigned char* const barrier = shared + a.barrier_at;
  const int thread = device::thread_index(), lane = thread & 31, warp = (thread >> 5) & 3;
  const int group = device::uniform(thread / kWgmmaGroupThreads);
  const int first_channel = device::block_row() * kN * 8;
  unsigned char* const stages = shared + a.stages_at + group * c.stages * c.stage_bytes;

  if (thread == 0) device::init_barrier(barrier, 1);
  if constexpr (kVariant == Variant::kTail) {
    load_tail<P, kN>(c, shared + a.results_at);
    device::commit_copies();
    device::wait_for_copies<0>();
  }
  device::sync_block();
  if (thread == 0) {
    device::expect_bytes(barrier, a.packing.block_bytes());
    device::copy_bulk(shared, c.weights + int64_t{device::block_row()} * a.packing.block_bytes(),
                      a.packing.block_bytes(), barrier);
  }
  // Zeros that fill up an odd number of units; loads leave them alone.
  if (a.packing.units % 2 == 1) {
    for (int stage = 0; stage < c.stages; ++stage) {
      unsigned char* zeros = stages + stage * c.stage_bytes + a.packing.units * a.plane_bytes;
      for (int i = thread % kWgmmaGroupThreads * 16; i < a.plane_bytes; i += kWgmmaGroupThreads * 16) {
        device::store_shared(zeros + i, U32x4{0, 0, 0, 0});
      }
    }
  }
  device::wait_for_previous_grid();
  device::allow_next_grid();

  const auto tiles = static_cast<uint32_t>(c.tiles), groups = static_cast<uint32_t>(a.groups);
  const uint32_t all = static_cast<uint32_t>(device::grid_size()) * groups;
  const auto load = [&](uint32_t t, int stage) {
    load_planes<Value>(a, locate(c, static_cast<int>(t)), stages + stage * c.stage_bytes);
    device::commit_copies();
  };
  auto t = static_cast<uint32_t>(device::block_index()) * groups + static_cast<uint32_t>(group);
  if (t < tiles) load(t, 0);
  // All warpgroups of a block go round equally often; those that are out of tiles pass the turn on.
  uint32_t rounds = (tiles - static_cast<uint32_t>(device::block_index()) * groups + all - 1) / all;
  const bool turns = groups > 1, last_group = group == a.groups - 1;
  const auto take_turn = [&] {
    if (turns) device::sync_threads(turn_barrier(group), 2 * kWgmmaGroupThreads);
  };
  const auto pass_turn = [&] {
    const bool over = last_group && rounds == 1;
    if (turns && !over) device::arrive_threads(turn_barrier(last_group ? 0 : group + 1), 2 * kWgmmaGroupThreads);
  };
  if (turns && last_group) device::arrive_threads(turn_barrier(0), 2 * kWgmmaGroupThreads);
  device::wait_for_bytes(barrier, 0);
  int stage = 0;
  for (; t < tiles; t += all, --rounds, stage ^= c.stages - 1) {
    const uint32_t next = t + all;
    float sums[kWgmmaProducts][kN][4];
    device::wait_for_copies<0>();
    device::fence_async_proxy();
    device::sync_threads(group_barrier(group), kWgmmaGroupThreads);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float* bias = c.bias + first_channel + n * 8 + (lane & 3) * 2;
      const float b0 = device::load_global<float>(bias), b1 = device::load_global<float>(bias + 1);
#pragma unroll
      for (int m = 0; m < kWgmmaProducts; ++m) {
        sums[m][n][0] = sums[m][n][2] = b0;
        sums[m][n][1] = sums[m][n][3] = b1;
      }
    }
    take_turn();
    multiply_planes<P, kN>(a, stages + stage * c.stage_bytes, shared, sums);
    pass_turn();
    if (c.stages == 2 && next < tiles) load(next, stage ^ 1);
    device::wait_for_products<0>(sums);
    if (c.stages == 1 && next < tiles) {
      device::sync_threads(group_barrier(group), kWgmmaGroupThreads);
      load(next, 0);
    }
    const Tile tile = locate(c, static_cast<int>(t));
    store_results<P, kN, kWgmmaProducts, kVariant>(
        c, tile, first_channel, sums, shared + a.results_at,
        [&](int m, int i) -> Pixel { return {tile.y + 2 * warp + (i >> 3), tile.x + 8 * m + (i & 7)}; });
  }
  for (; rounds > 0; --rounds) {
    take_turn();
    pass_turn();
  }
}

template <typename P, Variant kVariant, int... kIndex>
void launch_wgmma_instance(const char* name, const Wgmma& w, device::Stream stream, bool overlap,
                           std::integer_sequence<int, kIndex...>) {
  constexpr void (*kInstances[])(WgmmaArgs) = {&wgmma_kernel<P, kIndex + 1, kVariant>...};
  device::launch(name, kInstances[w.shape.instance - 1], w.shape, stream, overlap, w.args);
}

template <typename P>
void launch_wgmma_instance(const char* name, const char* tail_name, const Wgmma& w, device::Stream stream,
                           bool overlap) {
  constexpr auto kTiles = std::make_integer_sequence<int, kMostTiles>();
  if (w.args.convolution.tail_weights == nullptr) {
    launch_wgmma_instance<P, Variant::kForward>(name, w, stream, overlap, kTiles);
  } else {
    launch_wgmma_instance<P, Variant::kTail>(tail_name, w, stream, overlap, kTiles);
  }
}

}  // namespace esr::cuda
