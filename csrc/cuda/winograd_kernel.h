// F(2x2, 3x3) on tensor cores. A square of 4x4 input pixels d becomes V = Bt d B, its weights U = G g Gt, and four
// pixels are At (U V summed over channels) A. A fragment's rows are 16 squares, so that all of a lane's transforms are
// of its own registers.
#pragma once

#include <utility>

#include "convolution_kernel.h"
#include "winograd.h"

namespace esr::cuda {

// Number k of Bt's four.
ESR_DEVICE uint32_t transformed(int k, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  using device::add_pairs, device::subtract_pairs, device::float16;
  if (k == 0) return subtract_pairs<float16>(x0, x2);
  if (k == 1) return add_pairs<float16>(x1, x2);
  if (k == 2) return subtract_pairs<float16>(x2, x1);
  return subtract_pairs<float16>(x1, x3);
}

// Whether number k of four counts for number `to` of two, and if it does, its sign: At, but the last one's sign is the
// weights'.
constexpr bool counts(int k, int to) { return to == 0 ? k < 3 : k > 0; }
constexpr bool negative(int k, int to) { return to == 1 && k == 2; }

// Adds one step of 16 channels of 16 squares to their pixels' sums, [2 row + column].
template <int kN>
ESR_DEVICE void multiply_squares(const uint32_t (&d)[4][4][4], const unsigned char* weights, int position_bytes,
                                 float (&sums)[4][kN][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t row[4][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int r = 0; r < 4; ++r) row[c][r] = transformed(i, d[0][c][r], d[1][c][r], d[2][c][r], d[3][c][r]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t values[4], b[kN][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) values[r] = transformed(j, row[0][r], row[1][r], row[2][r], row[3][r]);
      load_fragments<Float16, kN>(weights + (4 * i + j) * position_bytes, b);
      if (i % 3 == 0 && j % 3 == 0) {  // for one pixel only
#pragma unroll
        for (int n = 0; n < kN; ++n)
          device::multiply_add<device::float16>(sums[2 * (i / 3) + j / 3][n], values, b[n][0], b[n][1]);
        continue;
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        device::multiply_add<device::float16>(products, values, b[n][0], b[n][1]);
#pragma unroll
        for (int to = 0; to < 4; ++to) {
          if (!counts(i, to / 2) || !counts(j, to % 2)) continue;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            sums[to][n][r] += negative(i, to / 2) != negative(j, to % 2) ? -products[r] : products[r];
          }
        }
      }
    }
  }
}

template <typename P, int kN>
ESR_KERNEL(256, 1)
winograd_kernel(ESR_ARGUMENT(WinogradArgs) a) {
  using Value = typename P::Value;
  const ConvolutionArgs& c = a.convolution;
  unsigned char* const shared = device::shared_memory();
  const int lane = device::thread_index() & 31, warp = device::thread_index() >> 5;
  const int row = warp & (kWinogradRows - 1), group = warp / kWinogradRows;
  const int first_channel = (device::block_row() * a.packing.groups + group) * kN * 8;

  const unsigned char* weights = c.weights + int64_t{device::block_row()} * a.packing.block_bytes();
  for (int i = device::thread_index() * 16; i < a.packing.block_bytes(); i += device::thread_count() * 16) {
    device::copy_async<16>(shared + c.weights_at + i, weights + i, true);
  }
  if (device::thread_index() == 0) device::store_shared(shared + c.zeros_at, U32x4{0, 0, 0, 0});
  device::commit_copies();
  device::wait_for_previous_grid();
  device::allow_next_grid();

  const auto tiles = static_cast<uint32_t>(c.tiles), blocks = static_cast<uint32_t>(device::grid_size());
  auto t = static_cast<uint32_t>(device::block_index());
  const auto load_tile = [&](uint32_t tile, int stage) {
    load_input<Value, true>(c, c.inputs[0], locate(c, static_cast<int>(tile)), 0, a.packing.units,
                            shared + stage * c.stage_bytes);
    device::commit_copies();
  };
  load_tile(t, 0);
  for (int stage = 0;; stage ^= c.stages - 1) {
    const Tile tile = locate(c, static_cast<int>(t));
    const uint32_t next = t + blocks;
    device::wait_for_copies<0>();
    device::sync_block();
    if (c.stages == 2 && next < tiles) load_tile(next, stage ^ 1);

    float sums[4][kN][4];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float* bias = c.bias + first_channel + n * 8 + (lane & 3) * 2;
      const float b0 = device::load_global<float>(bias), b1 = device::load_global<float>(bias + 1);
#pragma unroll
      for (int to = 0; to < 4; ++to) {
        sums[to][n][0] = sums[to][n][2] = b0;
        sums[to][n][1] = sums[to][n][3] = b1;
      }
    }
    // Even columns lie before odd ones, so that those of neighbouring squares are neighbours.
    const unsigned char* square = shared + stage * c.stage_bytes + (2 * row * c.in_tile_width + (lane & 15)) * c.pitch;
    const unsigned char* fragments = shared + c.weights_at + (group * kN * 32 + lane) * 8;
#pragma unroll 1
    for (int step = 0; step < a.packing.steps(); ++step) {
      const int unit = 2 * step + (lane >> 4);
      const bool exists = unit < a.packing.units;
      const unsigned char* from = exists ? square + unit * kUnitBytes : shared + c.zeros_at;
      const int pitch = exists ? c.pitch : 0;
      uint32_t d[4][4][4];
#pragma unroll
      for (int y = 0; y < 4; ++y) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int pixel = y * c.in_tile_width + (x & 1) * (c.in_tile_width >> 1) + (x >> 1);
          device::load_matrices(d[y][x], from + pixel * pitch);
          if constexpr (!std::is_same_v<Value, device::float16>) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              float low, high;
              device::unpack_pair<Value>(d[y][x][r], low, high);
              d[y][x][r] = device::pack_pair<device::float16>(low, high);
            }
          }
        }
      }
      multiply_squares<kN>(d, fragments + step * kWinogradPositions * a.packing.position_bytes(),
                           a.packing.position_bytes(), sums);
    }

    if (c.stages == 1) {
      device::sync_block();
      if (next < tiles) load_tile(next, 0);
    }
    store_results<P, kN, 4, Variant::kForward>(
        c, tile, first_channel, sums, shared + a.results_at,
        [&](int to, int pixel) -> Pixel { return {tile.y + 2 * row + (to >> 1), tile.x + 2 * pixel + (to & 1)}; });
    if (next >= tiles) break;
    t = next;
  }
}

template <typename P, int... kIndex>
void launch_winograd_instance(const char* name, const Winograd& w, device::Stream stream, bool overlap,
                              std::integer_sequence<int, kIndex...>) {
  constexpr void (*kInstances[])(WinogradArgs) = {&winograd_kernel<P, kIndex + 1>...};
  device::launch(name, kInstances[w.shape.instance - 1], w.shape, stream, overlap, w.args);
}

template <typename P>
void launch_winograd_instance(const char* name, const Winograd& w, device::Stream stream, bool overlap) {
  launch_winograd_instance<P>(name, w, stream, overlap, std::make_integer_sequence<int, kMostWinogradTiles>());
}

}  // namespace esr::cuda
