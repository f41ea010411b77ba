// The convolution kernel. One block computes tiles of output pixels, each of its warps kM x 16 pixels and kN x 8
// channels.
#pragma once

#include "convolution_kernels.h"
#include "epilogue.h"
#include "pixel.h"
#include "tf32.h"

namespace esr::cuda {

// What a precision means: the type in memory, the type of products, registers of a lane's weights.
struct Float16 {
  using Value = device::float16;
  using Product = device::float16;
  static constexpr int kWeights = 2;
};
struct BFloat16 {
  using Value = device::bfloat16;
  using Product = device::bfloat16;
  static constexpr int kWeights = 2;
};
struct Tf32 {
  using Value = float;
  using Product = device::tf32;
  static constexpr int kWeights = 2;
};
struct Tf32x3 {
  using Value = float;
  using Product = device::tf32;
  static constexpr int kWeights = 4;
};

// More channels need more accumulators: with up to 4 tiles of channels a warp takes 64 pixels, else 32.
constexpr int row_tiles(int channel_tiles) { return channel_tiles <= 4 ? 4 : 2; }

constexpr int kLastTap = -1;  // in the table of offsets: no unit, the odd half of the last step

struct Tile {
  int64_t image;
  int y, x;  // of its first output pixel
};

template <typename Args>
ESR_DEVICE Tile locate(const Args& a, int tile) {
  const int per_image = a.tiles_across * a.tiles_down;
  const int image = tile / per_image, rest = tile % per_image;
  const int down = rest / a.tiles_across;
  return {image, down * a.tile_height, (rest - down * a.tiles_across) << a.tile_width_log2};
}

// The position a padded coordinate stands for; outside of [0, size) it is a zero.
ESR_DEVICE int mirrored(int i, int size, bool reflect) {
  if (!reflect) return i;
  i = i < 0 ? -i : i;
  return i >= size ? 2 * size - 2 - i : i;
}

// i / d for 0 <= i < 65536 / d, with reciprocal = 65536 / d + 1.
ESR_DEVICE int divided(int i, int reciprocal) { return (i * reciprocal) >> 16; }

// One pixel's unit from a tensor of any strides.
template <typename Value>
ESR_DEVICE U32x4 gather_unit(const View& v, const unsigned char* pixel, int channel, const float* shift,
                             const float* scale) {
  constexpr int kChannels = kUnitBytes / sizeof(Value);
  float values[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int c = channel + i;
    values[i] = 0.0f;
    if (c < v.channels) {
      values[i] = device::to_float(device::load_global<Value>(pixel + c * v.channel));
      if (scale != nullptr) {
        values[i] = (values[i] - device::load_global<float>(shift + c)) * device::load_global<float>(scale + c);
      }
    }
  }
  if constexpr (sizeof(Value) == 4) {
    return {device::float_bits(values[0]), device::float_bits(values[1]), device::float_bits(values[2]),
            device::float_bits(values[3])};
  } else {
    return {device::pack_pair<Value>(values[0], values[1]), device::pack_pair<Value>(values[2], values[3]),
            device::pack_pair<Value>(values[4], values[5]), device::pack_pair<Value>(values[6], values[7])};
  }
}

// Brings units [first, first + units) of a tile's input pixels to shared memory; where columns are apart, all even ones
// of a row before all odd ones.
template <typename Value, bool kColumnsApart = false, typename Args>
ESR_DEVICE void load_input(const Args& a, const View& v, const Tile& tile, int first, int units, unsigned char* stage) {
  constexpr int kChannels = kUnitBytes / sizeof(Value);
  const int lane = device::thread_index() & 31, warp = device::thread_index() >> 5;
  const int warps = device::thread_count() >> 5;
  const int y0 = tile.y * a.stride - a.padding, x0 = tile.x * a.stride - a.padding;
  const unsigned char* image = v.data + tile.image * v.image;
  const int count = a.in_tile_width * units;
  // Neighbouring lanes take what lies side by side in memory.
  const bool planar = !v.blocked && v.channel != static_cast<int64_t>(sizeof(Value));
  const int divisor = planar ? a.in_tile_width : units;
  const int reciprocal = 65536 / divisor + 1;
  for (int r = warp; r < a.in_tile_height; r += warps) {
    const int y = mirrored(y0 + r, a.height, a.reflect);
    const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.height);
    const unsigned char* row = image + y * v.row;
    unsigned char* out = stage + r * a.in_tile_width * a.pitch;
    for (int i = lane; i < count; i += 32) {
      const int quotient = divided(i, reciprocal), remainder = i - quotient * divisor;
      const int column = planar ? remainder : quotient, unit = planar ? quotient : remainder;
      const int x = mirrored(x0 + column, a.width, a.reflect);
      const bool inside = row_inside && static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
      const int place = kColumnsApart ? (column & 1) * (a.in_tile_width >> 1) + (column >> 1) : column;
      unsigned char* to = out + place * a.pitch + unit * kUnitBytes;
      const unsigned char* pixel = row + x * v.pixel;
      if (v.blocked) {
        device::copy_async<16>(to, inside ? pixel + (first + unit) * kUnitBytes : v.data, inside);
      } else {
        U32x4 value = {0, 0, 0, 0};
        if (inside) value = gather_unit<Value>(v, pixel, (first + unit) * kChannels, a.shift, a.scale);
        device::store_shared(to, value);
      }
    }
  }
}

// Weights of a slab, and where in a tile each of its units lies, seen from the pixel of the first tap.
template <int kN, int kWeights>
ESR_DEVICE void load_weights(const ConvolutionArgs& a, int first_step, int units, unsigned char* stage) {
  const int thread = device::thread_index(), threads = device::thread_count();
  const int taps = a.taps_across * a.taps_across, steps = Packing::steps(taps, units);
  constexpr int kStepBytes = kN * 32 * kWeights * 4;
  const unsigned char* from =
      a.weights + (static_cast<int64_t>(device::block_row()) * a.total_steps + first_step) * kStepBytes;
  for (int i = thread; i < steps * (kStepBytes / 16); i += threads) {
    device::copy_async<16>(stage + a.weights_at + i * 16, from + i * 16, true);
  }
  for (int i = thread; i < 2 * steps; i += threads) {
    const int tap = i / units, dy = tap / a.taps_across, dx = tap - dy * a.taps_across;
    const int offset = (dy * a.in_tile_width + dx) * a.pitch + (i - tap * units) * kUnitBytes;
    device::store_shared<int>(stage + a.table_at + i * 4, tap < taps ? offset : kLastTap);
  }
  if (thread == 0) device::store_shared(stage + a.zeros_at, U32x4{0, 0, 0, 0});
}

// A lane's weights of one step, of all tiles of channels.
template <typename P, int kN>
ESR_DEVICE void load_fragments(const unsigned char* weights, uint32_t (&b)[kN][P::kWeights]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const unsigned char* p = weights + n * (32 * P::kWeights * 4);
    if constexpr (P::kWeights == 4) {
      const U32x4 v = device::load_shared<U32x4>(p);
      b[n][0] = v.x, b[n][1] = v.y, b[n][2] = v.z, b[n][3] = v.w;
    } else {
      const U32x2 v = device::load_shared<U32x2>(p);
      b[n][0] = v.x, b[n][1] = v.y;
    }
  }
}

// Adds one step's products of 16 pixels.
template <typename P, int kN>
ESR_DEVICE void multiply_rows(uint32_t (&rows)[4], const uint32_t (&b)[kN][P::kWeights], float (&sums)[kN][4]) {
  if constexpr (P::kWeights == 4) {
    // a b = ah bl + al bh + ah bh, the small products first; one part of a at a time spares registers.
    uint32_t part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = finite_or_zero(device::round_tf32(device::bits_float(rows[i])));
#pragma unroll
    for (int n = 0; n < kN; ++n) device::multiply_add<device::tf32>(sums[n], part, b[n][2], b[n][3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float v = device::bits_float(rows[i]);
      part[i] = left_over(v, device::round_tf32(v));
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) device::multiply_add<device::tf32>(sums[n], part, b[n][0], b[n][1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = device::round_tf32(device::bits_float(rows[i]));
#pragma unroll
    for (int n = 0; n < kN; ++n) device::multiply_add<device::tf32>(sums[n], part, b[n][0], b[n][1]);
  } else {
    if constexpr (sizeof(typename P::Value) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = device::round_tf32(device::bits_float(rows[i]));
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) device::multiply_add<typename P::Product>(sums[n], rows, b[n][0], b[n][1]);
  }
}

// Adds the products of one slab. `a` tells where the table, the weights and the zeros lie, seen from the pixels.
template <typename P, int kN, int kM, typename Offsets>
ESR_DEVICE void multiply_slab(const Offsets& a, int steps, const unsigned char* stage, const int (&base)[kM],
                              float (&sums)[kM][kN][4]) {
  const int lane = device::thread_index() & 31;
  const unsigned char* table = stage + a.table_at + (lane >> 4) * 4;
  const unsigned char* weights = stage + a.weights_at + lane * (P::kWeights * 4);
#pragma unroll(P::kWeights == 4 ? 1 : 2)
  for (int step = 0; step < steps; ++step) {
    const int offset = device::load_shared<int>(table + step * 8);
    uint32_t b[kN][P::kWeights];
    load_fragments<P, kN>(weights + step * (kN * 32 * P::kWeights * 4), b);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t rows[4];
      device::load_matrices(rows, stage + (offset == kLastTap ? a.zeros_at : base[m] + offset));
      multiply_rows<P, kN>(rows, b, sums[m]);
    }
  }
}

// The same with float16 sums of two steps at a time, which is as far as they stay within the accuracy of float16
// results.
template <int kN, int kM>
ESR_DEVICE void multiply_slab_in_halves(const ConvolutionArgs& a, int steps, const unsigned char* stage,
                                        const int (&base)[kM], float (&sums)[kM][kN][4]) {
  const int lane = device::thread_index() & 31;
  const unsigned char* table = stage + a.table_at + (lane >> 4) * 4;
  const unsigned char* weights = stage + a.weights_at + lane * 8;
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    const bool both = step + 1 < steps;
    int offsets[2];
    uint32_t b[2][kN][2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s == 1 && !both) continue;
      offsets[s] = device::load_shared<int>(table + (step + s) * 8);
      load_fragments<Float16, kN>(weights + (step + s) * (kN * 32 * 8), b[s]);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t halves[kN][2] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s == 1 && !both) continue;
        uint32_t rows[4];
        device::load_matrices(rows, stage + (offsets[s] == kLastTap ? a.zeros_at : base[m] + offsets[s]));
#pragma unroll
        for (int n = 0; n < kN; ++n) device::multiply_add_half(halves[n], rows, b[s][n][0], b[s][n][1]);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float low, high;
          device::unpack_pair<device::float16>(halves[n][h], low, high);
          sums[m][n][2 * h] += low;
          sums[m][n][2 * h + 1] += high;
        }
      }
    }
  }
}

// Lays 16 pixels' sums down, where rows of eight channels can be read.
template <int kN>
ESR_DEVICE void turn_around(const float (&sums)[kN][4], float* results) {
  constexpr int kPitch = result_pitch(kN);
  const int lane = device::thread_index() & 31, group = lane >> 2, pair = (lane & 3) * 2;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      device::store_shared(results + (group + 8 * h) * kPitch + n * 8 + pair,
                           U32x2{device::float_bits(sums[n][2 * h]), device::float_bits(sums[n][2 * h + 1])});
    }
  }
}

ESR_DEVICE void read_results(const float* results, float (&values)[8]) {
#pragma unroll
  for (int k = 0; k < 8; k += 4) {
    const U32x4 v = device::load_shared<U32x4>(results + k);
    values[k] = device::bits_float(v.x), values[k + 1] = device::bits_float(v.y);
    values[k + 2] = device::bits_float(v.z), values[k + 3] = device::bits_float(v.w);
  }
}

// Weights of the 1x1 convolution behind, for all tiles.
template <typename P, int kN>
ESR_DEVICE void load_tail(const ConvolutionArgs& a, unsigned char* shared) {
  const int lane_bytes = P::kWeights * 4, units = (a.out_channels * int{sizeof(typename P::Value)} + 15) / 16;
  const int count = (units + 1) / 2 * kN * 32 * lane_bytes / 16;
  for (int i = device::thread_index(); i < count; i += device::thread_count()) {
    device::copy_async<16>(shared + a.tail_at + i * 16, a.tail_weights + i * 16, true);
  }
}

// The left operand of a tail: eight channels of a pixel as values of the map that is never stored.
template <typename Value>
ESR_DEVICE void write_operand(unsigned char* to, const float (&values)[8]) {
  using device::float_bits;
  using device::pack_pair;
  if constexpr (sizeof(Value) == 4) {
    device::store_shared(
        to, U32x4{float_bits(values[0]), float_bits(values[1]), float_bits(values[2]), float_bits(values[3])});
    device::store_shared(
        to + 16, U32x4{float_bits(values[4]), float_bits(values[5]), float_bits(values[6]), float_bits(values[7])});
  } else {
    device::store_shared(to, U32x4{pack_pair<Value>(values[0], values[1]), pack_pair<Value>(values[2], values[3]),
                                   pack_pair<Value>(values[4], values[5]), pack_pair<Value>(values[6], values[7])});
  }
}

// The 1x1 convolution of 16 pixels whose results `operand` holds, turned around into `results`.
template <typename P, int kN>
ESR_DEVICE void multiply_tail(const ConvolutionArgs& a, const unsigned char* operand, const unsigned char* weights,
                              float* results) {
  constexpr int kOperandPitch = operand_pitch(kN, sizeof(typename P::Value));
  const int lane = device::thread_index() & 31;
  const int units = (a.out_channels * int{sizeof(typename P::Value)} + 15) / 16;
  float sums[kN][4];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float* bias = a.tail_bias + n * 8 + (lane & 3) * 2;
    sums[n][0] = sums[n][2] = device::load_global<float>(bias);
    sums[n][1] = sums[n][3] = device::load_global<float>(bias + 1);
  }
  const unsigned char* row = operand + (lane & 15) * kOperandPitch + (lane >> 4) * kUnitBytes;
  weights += lane * (P::kWeights * 4);
#pragma unroll 1
  for (int step = 0; step < (units + 1) / 2; ++step) {
    uint32_t b[kN][P::kWeights], rows[4];
    load_fragments<P, kN>(weights + step * (kN * 32 * P::kWeights * 4), b);
    device::load_matrices(rows, row + step * 2 * kUnitBytes);
    multiply_rows<P, kN>(rows, b, sums);
  }
  turn_around<kN>(sums, results);
}

struct Pixel {
  int y, x;
};

// The pixels of a warp's products one after the other, in rows as wide as the tile.
template <int kM>
struct PixelsInRows {
  const ConvolutionArgs& a;
  const Tile& tile;

  ESR_DEVICE Pixel operator()(int m, int pixel) const {
    const int q = ((device::thread_index() >> 5) * kM + m) * 16 + pixel;
    return {tile.y + (q >> a.tile_width_log2), tile.x + (q & ((1 << a.tile_width_log2) - 1))};
  }
};

// The tile's part of a map of rounded values, kN units a pixel, from shared memory: `at(row, column)` is where a pixel
// of the tile lies.
template <typename Value, int kN, typename Args, typename At>
ESR_DEVICE void write_tile(const Args& a, const View& map, int channels, const Tile& tile, const At& at) {
  const int count = a.tile_height << a.tile_width_log2;
  const bool pixels_first = !map.blocked && map.channel != int64_t{sizeof(Value)};
  for (int i = device::thread_index(); i < count * kN; i += device::thread_count()) {
    const int pixel = pixels_first ? i % count : i / kN, n = pixels_first ? i / count : i % kN;
    const int row = pixel >> a.tile_width_log2, column = pixel & ((1 << a.tile_width_log2) - 1);
    const int y = tile.y + row, x = tile.x + column;
    if (y >= a.height || x >= a.width || n * 8 >= channels) continue;
    const U32x4 bits = device::load_shared<U32x4>(at(row, column) + n * kUnitBytes);
    float values[8];
    device::unpack_pair<Value>(bits.x, values[0], values[1]);
    device::unpack_pair<Value>(bits.y, values[2], values[3]);
    device::unpack_pair<Value>(bits.z, values[4], values[5]);
    device::unpack_pair<Value>(bits.w, values[6], values[7]);
    write_channels<Value>(map, 1, tile.image, y, x, n * 8, channels, values);
  }
}

// Epilogue and stores of one warp; one for a backward pass knows no pixel shuffle. The
// results pass through shared memory, 16 pixels at a time, from the layout of tensor-core products to eight channels of
// a pixel for each lane. `place(m, i)` is where pixel i of product m lies.
template <typename P, int kN, int kM, Variant kVariant, typename Place>
ESR_DEVICE void store_results(const ConvolutionArgs& a, const Tile& tile, int first_channel,
                              const float (&sums)[kM][kN][4], unsigned char* shared, const Place& place) {
  using Value = typename P::Value;
  constexpr int kPitch = result_pitch(kN);
  constexpr bool kBackward = kVariant == Variant::kBackward, kTail = kVariant == Variant::kTail;
  const int shuffle = kBackward ? 1 : a.shuffle;
  const int lane = device::thread_index() & 31, warp = device::thread_index() >> 5;
  unsigned char* const own = shared + warp * result_bytes(kN, sizeof(Value), kTail);
  float* const results = reinterpret_cast<float*>(own);
  const bool pixels_first = !a.output.blocked && (shuffle > 1 || a.output.channel != int64_t{sizeof(Value)});
  constexpr int kOperandPitch = operand_pitch(kN, sizeof(Value));
  if constexpr (kTail) {
    // The odd half of a last step is multiplied by zero weights, and must be a number.
    constexpr int kUnits = kN * 8 * int{sizeof(Value)} / kUnitBytes;
    if (kUnits % 2 == 1 && lane < 16) {
      device::store_shared(own + 16 * kPitch * 4 + lane * kOperandPitch + kUnits * kUnitBytes, U32x4{0, 0, 0, 0});
    }
  }
#pragma unroll 1
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {  // unrolled, so that sums stay in registers
      if (i == m) turn_around<kN>(sums[i], results);
    }
    device::sync_warp();
    for (int i = lane; i < 16 * kN; i += 32) {
      const int pixel = pixels_first ? i & 15 : i / kN, n = pixels_first ? i >> 4 : i - pixel * kN;
      const auto [y, x] = place(m, pixel);
      const int c = first_channel + n * 8;
      const bool inside = y < a.out_height && x < a.out_width && c < a.out_channels;
      if (!kTail && !inside) continue;
      float values[8] = {}, residual[8] = {};
      if (inside) {
        read_results(results + pixel * kPitch + n * 8, values);
        if (a.residual.data != nullptr) {
          read_channels<Value>(a.residual, shuffle, tile.image, y, x, c, a.out_channels, residual);
        }
      }
      if constexpr (kTail) {
        finish(values, residual, a.activation, a.slope, a.residual_mode);
        write_operand<Value>(own + 16 * kPitch * 4 + pixel * kOperandPitch + n * (8 * int{sizeof(Value)}), values);
        continue;
      }
      if constexpr (!kBackward) {
        finish(values, residual, a.activation, a.slope, a.residual_mode);
      } else if (a.pass == Pass::kForward) {
        if (a.second.data != nullptr) {
          write_channels<Value>(a.second, 1, tile.image, y, x, c, a.out_channels, values);
        }
        finish(values, residual, a.activation, a.slope, a.residual_mode);
      } else {
        float given[8];
        read_channels<Value>(a.given, 1, tile.image, y, x, c, a.out_channels, given);
        if (a.pass == Pass::kBackward) {
          finish_backward(values, residual, given, a.activation, a.slope, a.residual_mode);
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k) residual[k] += values[k];
          differentiate(given, residual, a.activation, a.slope);
#pragma unroll
          for (int k = 0; k < 8; ++k) values[k] = given[k];
        }
        if (a.second.data != nullptr) {
          write_channels<Value>(a.second, 1, tile.image, y, x, c, a.out_channels, residual);
        }
      }
      write_channels<Value>(a.output, shuffle, tile.image, y, x, c, a.out_channels, values);
    }
    device::sync_warp();
    if constexpr (kTail) {
      multiply_tail<P, kN>(a, own + 16 * kPitch * 4, shared + a.tail_at, results);
      device::sync_warp();
      for (int i = lane; i < 16 * kN; i += 32) {
        const int pixel = pixels_first ? i & 15 : i / kN, n = pixels_first ? i >> 4 : i - pixel * kN;
        const auto [y, x] = place(m, pixel);
        if (y >= a.out_height || x >= a.out_width || n * 8 >= a.tail_channels) continue;
        float values[8];
        read_results(results + pixel * kPitch + n * 8, values);
        activate(values, a.tail_activation, a.tail_slope);
        write_channels<Value>(a.output, 1, tile.image, y, x, n * 8, a.tail_channels, values);
      }
      device::sync_warp();
    }
  }
}

// The bounds of a launch, such that nothing is spilled. Two blocks of 256 threads share a multiprocessor's registers,
// but for three products each of most channels or with two convolutions, or for sums in two types, those do not
// suffice. Three products of few channels have shared memory for three blocks of 128 at most.
constexpr int most_threads(int channel_tiles) { return channel_tiles <= 4 ? 128 : 256; }

template <typename P>
constexpr int blocks_at_once(int channel_tiles, Variant variant) {
  const bool three_products = P::kWeights == 4, few = channel_tiles <= 4;
  if ((variant == Variant::kTail && three_products) || variant == Variant::kHalfSums) return few ? 2 : 1;
  if (three_products && few) return 3;
  if (three_products && channel_tiles == kMostTiles) return 1;
  return few ? 4 : 2;
}

template <typename P, int kN, Variant kVariant>
ESR_KERNEL(most_threads(kN), blocks_at_once<P>(kN, kVariant))
convolution_kernel(ESR_ARGUMENT(ConvolutionArgs) a) {
  using Value = typename P::Value;
  constexpr int kM = row_tiles(kN);
  unsigned char* const shared = device::shared_memory();
  const int lane = device::thread_index() & 31, warp = device::thread_index() >> 5;
  const int taps = a.taps_across * a.taps_across;
  const int first_channel = device::block_row() * kN * 8;

  int base[kM];  // of this lane's row of each product's left operand, at the first tap
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int q = (warp * kM + m) * 16 + (lane & 15);
    const int y = q >> a.tile_width_log2, x = q & ((1 << a.tile_width_log2) - 1);
    base[m] = (y * a.in_tile_width + x) * a.stride * a.pitch;
  }

  if (a.weights_stay) load_weights<kN, P::kWeights>(a, 0, a.units[0], shared);
  if constexpr (kVariant == Variant::kTail) load_tail<P, kN>(a, shared);
  device::commit_copies();
  device::wait_for_previous_grid();
  device::allow_next_grid();

  // 32 bits, unsigned: there are fewer than 2^31 tiles, and not more blocks.
  const auto tiles = static_cast<uint32_t>(a.tiles), blocks = static_cast<uint32_t>(device::grid_size());
  for (auto t = static_cast<uint32_t>(device::block_index()); t < tiles; t += blocks) {
    const Tile tile = locate(a, static_cast<int>(t));
    float sums[kM][kN][4];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float* bias = a.bias + first_channel + n * 8 + (lane & 3) * 2;
      const float b0 = device::load_global<float>(bias), b1 = device::load_global<float>(bias + 1);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        sums[m][n][0] = sums[m][n][2] = b0;
        sums[m][n][1] = sums[m][n][3] = b1;
      }
    }

    // The slab to load next: units [unit, unit + slab_units) of an input, and its first step.
    int input = 0, unit = 0, first_step = 0, loaded = 0;
    const auto load_next = [&] {
      const int left = a.units[input] - unit, units = left < a.slab_units ? left : a.slab_units;
      const int steps = Packing::steps(taps, units);
      unsigned char* stage = shared + (loaded & (a.stages - 1)) * a.stage_bytes;
      if (!a.weights_stay) load_weights<kN, P::kWeights>(a, first_step, units, stage);
      load_input<Value>(a, a.inputs[input], tile, unit, units, stage);
      device::commit_copies();
      first_step += steps;
      ++loaded;
      unit += units;
      if (unit == a.units[input]) ++input, unit = 0;
      return steps;
    };
    int next_steps = 0;
    for (int slab = 0; slab < loaded || input < a.input_count; ++slab) {
      int steps = next_steps;
#pragma unroll 1  // one place that loads: a second one costs registers
      while (loaded < slab + a.stages && input < a.input_count) {
        next_steps = load_next();
        if (loaded == slab + 1) steps = next_steps;
      }
      if (loaded > slab + 1) {
        device::wait_for_copies<1>();
      } else {
        device::wait_for_copies<0>();
      }
      device::sync_block();
      const unsigned char* stage = shared + (slab & (a.stages - 1)) * a.stage_bytes;
      if constexpr (kVariant == Variant::kHalfSums) {
        multiply_slab_in_halves<kN, kM>(a, steps, stage, base, sums);
      } else {
        multiply_slab<P, kN, kM>(a, steps, stage, base, sums);
      }
      device::sync_block();
    }
    store_results<P, kN, kM, kVariant>(a, tile, first_channel, sums, shared, PixelsInRows<kM>{a, tile});
    device::sync_block();
  }
}

}  // namespace esr::cuda
