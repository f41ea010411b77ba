// out = x sigmoid(w4 (resize(low) + wf x + bf) + b4): a warp computes 16 pixels of a row at a time.
//
// The tile of x stays in shared memory, is the left operand of the skip convolution, and is gated there in place. That
// convolution's accumulators start as the resized map and become the left operand of the last convolution in registers.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "convolution_kernel.h"
#include "esa.h"
#include "tf32.h"

namespace esr::cuda {
namespace {

constexpr int kPixels = 16;
constexpr int kMostWarps = 8;
// A row of 16 pixels reads so many columns of `low`, which is less than a sixth as wide as x.
constexpr int kLowColumns = 5;
constexpr int kReciprocalBits = 20;
constexpr int kMostUnits = 256;  // i units < 2^20 for i < 16 units

// Blocks of a multiprocessor, by the registers that accumulators and left operands need.
constexpr int blocks_of(int lane_bytes, int hidden_tiles) {
  if (hidden_tiles > 4 && lane_bytes == 16) return 1;
  return hidden_tiles <= 2 ? 4 : (hidden_tiles <= 4 && lane_bytes == 8 ? 3 : 2);
}
// Whether the weights lie at the start of shared memory. Those of the most hidden channels may be too many.
constexpr bool stay(int hidden_tiles) { return hidden_tiles < kMostHiddenTiles; }
// Floats from a column of `low` to the next in shared memory.
constexpr int column_pitch(int hidden_tiles) { return hidden_tiles * 8 + 8; }

// One step's left operand as products take it: for tf32x3 the value as tf32, and what that cuts off.
template <typename P>
struct Left {
  static constexpr int kParts = P::kWeights / 2;
  uint32_t parts[kParts][4];

  // `rows`: pairs of 16-bit values, or float32 values.
  static ESR_DEVICE Left of(const uint32_t (&rows)[4]) {
    Left left;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(typename P::Value) == 2) {
        left.parts[0][i] = rows[i];
      } else {
        left.parts[0][i] = device::round_tf32(device::bits_float(rows[i]));
        if constexpr (kParts == 2) {
          left.parts[1][i] = left_over(device::bits_float(rows[i]), left.parts[0][i]);
        }
      }
    }
    return left;
  }
};

// Products with kN tiles of weights at `weights`, this lane's of the first.
template <typename P, int kN, bool kStay>
ESR_DEVICE void multiply(const Left<P>& left, const unsigned char* weights, float (&sums)[kN][4]) {
  uint32_t b[kN][P::kWeights];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const unsigned char* p = weights + n * (32 * P::kWeights * 4);
    if constexpr (P::kWeights == 4) {
      const U32x4 v = load_weights<U32x4, kStay>(p);
      b[n][0] = v.x, b[n][1] = v.y, b[n][2] = v.z, b[n][3] = v.w;
    } else {
      const U32x2 v = load_weights<U32x2, kStay>(p);
      b[n][0] = v.x, b[n][1] = v.y;
    }
  }
  using Product = typename P::Product;
  if constexpr (P::kWeights == 4) {
    // The small products first.
#pragma unroll
    for (int n = 0; n < kN; ++n) device::multiply_add<Product>(sums[n], left.parts[1], b[n][0], b[n][1]);
    uint32_t finite[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) finite[i] = finite_or_zero(left.parts[0][i]);
#pragma unroll
    for (int n = 0; n < kN; ++n) device::multiply_add<Product>(sums[n], finite, b[n][2], b[n][3]);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) device::multiply_add<Product>(sums[n], left.parts[0], b[n][0], b[n][1]);
}

// 16 pixels of a row.
struct Segment {
  int64_t image;
  int y, x;
};

ESR_DEVICE Segment locate(const GateArgs& a, int tile) {
  const int line = tile / a.segments, image = line / a.height;
  return {image, line - image * a.height, (tile - line * a.segments) * kPixels};
}

// A position between two rows or columns of `low`, as F.interpolate finds it: first + rest / (2 size). Negative ones,
// which have first = 0, stand for 0.
struct Between {
  int first, rest;
};

ESR_DEVICE Between between(int i, int low, int size) {
  const int numerator = (2 * i + 1) * low - size;
  const int first = numerator > 0 ? numerator / (2 * size) : 0;
  return {first, numerator - first * (2 * size)};
}

// Item i of a tile's 16 pixels times units; neighbouring lanes take what lies side by side in memory.
struct Item {
  int pixel, unit;
};

ESR_DEVICE Item find_item(const GateArgs& a, bool planar, int i) {
  if (planar) return {i % kPixels, i / kPixels};
  const int pixel = (i * a.units_reciprocal) >> kReciprocalBits;
  return {pixel, i - pixel * a.units};
}

template <typename Value>
ESR_DEVICE void load_pixels(const GateArgs& a, const Segment& s, unsigned char* tile) {
  constexpr int kChannels = kUnitBytes / sizeof(Value);
  const View& v = a.x;
  const bool planar = !v.blocked && v.channel != static_cast<int64_t>(sizeof(Value));
  const unsigned char* row = v.data + s.image * v.image + s.y * v.row;
  for (int i = device::thread_index() & 31; i < kPixels * a.units; i += 32) {
    const Item item = find_item(a, planar, i);
    const int x = s.x + item.pixel;
    const bool inside = x < a.width;
    const unsigned char* from = row + x * v.pixel;
    unsigned char* to = tile + item.pixel * a.pitch + item.unit * kUnitBytes;
    if (v.blocked) {
      device::copy_async<16>(to, inside ? from + item.unit * kUnitBytes : v.data, inside);
    } else {
      U32x4 value = {0, 0, 0, 0};
      if (inside) value = gather_unit<Value>(v, from, item.unit * kChannels, nullptr, nullptr);
      device::store_shared(to, value);
    }
  }
  device::commit_copies();
}

template <typename Value>
ESR_DEVICE void store_pixels(const GateArgs& a, const Segment& s, const unsigned char* tile) {
  constexpr int kChannels = kUnitBytes / sizeof(Value);
  const View& v = a.out;
  const bool planar = !v.blocked && v.channel != static_cast<int64_t>(sizeof(Value));
  unsigned char* row = v.data + s.image * v.image + s.y * v.row;
  for (int i = device::thread_index() & 31; i < kPixels * a.units; i += 32) {
    const Item item = find_item(a, planar, i);
    const int x = s.x + item.pixel;
    if (x >= a.width) continue;
    const U32x4 bits = device::load_shared<U32x4>(tile + item.pixel * a.pitch + item.unit * kUnitBytes);
    unsigned char* to = row + x * v.pixel;
    if (v.blocked) {
      device::store_global(to + item.unit * kUnitBytes, bits);
      continue;
    }
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int c = item.unit * kChannels + k;
      if (c >= a.channels) break;
      if constexpr (sizeof(Value) == 4) {
        device::store_global(to + c * v.channel, words[k]);
      } else {
        device::store_global(to + c * v.channel, static_cast<uint16_t>(words[k / 2] >> (k % 2 * 16)));
      }
    }
  }
}

// The columns of `low` that the segment reads, from the `first` on: both rows weighed, the skip convolution's bias
// added.
template <typename Value, int kH>
ESR_DEVICE void load_columns(const GateArgs& a, const Segment& s, int first, unsigned char* columns) {
  constexpr int kChannels = kUnitBytes / sizeof(Value), kUnits = kH * 8 / kChannels;
  const Between y = between(s.y, a.low_height, a.height);
  const float weight = y.rest > 0 ? static_cast<float>(y.rest) * a.per_height : 0.0f;
  const unsigned char* top = a.low.data + s.image * a.low.image + y.first * a.low.row;
  const unsigned char* bottom = top + (y.first + 1 < a.low_height ? a.low.row : 0);
  for (int i = device::thread_index() & 31; i < kLowColumns * kUnits; i += 32) {
    const int column = i / kUnits, unit = i % kUnits;
    const int x = first + column < a.low_width ? first + column : a.low_width - 1;
    const int64_t offset = x * a.low.pixel + unit * kUnitBytes;
    U32x4 bits[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (unit < a.low_units) {
      bits[0] = device::load_global<U32x4>(top + offset);
      bits[1] = device::load_global<U32x4>(bottom + offset);
    }
    const unsigned char* bias = a.skip + a.skip_bytes + unit * kChannels * 4;
    unsigned char* out = columns + (column * column_pitch(kH) + unit * kChannels) * 4;
    const uint32_t upper[4] = {bits[0].x, bits[0].y, bits[0].z, bits[0].w};
    const uint32_t lower[4] = {bits[1].x, bits[1].y, bits[1].z, bits[1].w};
#pragma unroll
    for (int k = 0; k < kChannels; k += 4) {
      float t[4], b[4];
      if constexpr (sizeof(Value) == 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) t[j] = device::bits_float(upper[j]), b[j] = device::bits_float(lower[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          device::unpack_pair<Value>(upper[k / 2 + j], t[2 * j], t[2 * j + 1]);
          device::unpack_pair<Value>(lower[k / 2 + j], b[2 * j], b[2 * j + 1]);
        }
      }
      const U32x4 more = device::load_global<U32x4>(bias + k * 4);
      const uint32_t biases[4] = {more.x, more.y, more.z, more.w};
      uint32_t sums[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[j] = device::float_bits(t[j] * (1.0f - weight) + b[j] * weight + device::bits_float(biases[j]));
      }
      device::store_shared(out + k * 4, U32x4{sums[0], sums[1], sums[2], sums[3]});
    }
  }
}

// Multiplies two channels of a pixel in shared memory by the sigmoid; what fills up the last unit stays as it is.
template <typename Value>
ESR_DEVICE void gate(const GateArgs& a, int c, float h0, float h1, unsigned char* p) {
  float x0, x1;
  if constexpr (sizeof(Value) == 4) {
    const U32x2 bits = device::load_shared<U32x2>(p);
    x0 = device::bits_float(bits.x), x1 = device::bits_float(bits.y);
  } else {
    device::unpack_pair<Value>(device::load_shared<uint32_t>(p), x0, x1);
  }
  x0 = c < a.channels ? x0 * sigmoid(h0) : x0;
  x1 = c + 1 < a.channels ? x1 * sigmoid(h1) : x1;
  if constexpr (sizeof(Value) == 4) {
    device::store_shared(p, U32x2{device::float_bits(x0), device::float_bits(x1)});
  } else {
    device::store_shared(p, device::pack_pair<Value>(x0, x1));
  }
}

template <typename P, int kH>
ESR_DEVICE void attend(const GateArgs& a, Between start, const unsigned char* skip, const unsigned char* last,
                       unsigned char* tile) {
  using Value = typename P::Value;
  constexpr bool kPairs = sizeof(Value) == 2;
  constexpr int kSteps = kPairs ? kH / 2 : kH, kFragment = 32 * P::kWeights * 4;
  [[maybe_unused]] constexpr int kUnroll = P::kWeights == 4 && kH == kMostHiddenTiles ? 1 : 2;  // registers
  const int lane = device::thread_index() & 31, group = lane >> 2, pair = (lane & 3) * 2;

  float sums[kH][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int column = 0, rest = start.rest + (group + 8 * h) * 2 * a.low_width;
#pragma unroll
    for (int k = 2; k < kLowColumns; ++k) {
      if (rest >= 2 * a.width) rest -= 2 * a.width, ++column;
    }
    const float weight = rest > 0 ? static_cast<float>(rest) * a.per_width : 0.0f;
    const unsigned char* p = tile + a.columns_at + (column * column_pitch(kH) + pair) * 4;
#pragma unroll
    for (int n = 0; n < kH; ++n) {
      const U32x2 left = device::load_shared<U32x2>(p + n * 32);
      const U32x2 right = device::load_shared<U32x2>(p + column_pitch(kH) * 4 + n * 32);
      sums[n][2 * h] = device::bits_float(left.x) * (1.0f - weight) + device::bits_float(right.x) * weight;
      sums[n][2 * h + 1] = device::bits_float(left.y) * (1.0f - weight) + device::bits_float(right.y) * weight;
    }
  }

  const unsigned char* row = tile + (lane & 15) * a.pitch + (lane >> 4) * kUnitBytes;
#pragma unroll kUnroll
  for (int step = 0; step < a.skip_steps; ++step) {
    uint32_t rows[4];
    device::load_matrices(rows, row + step * 2 * kUnitBytes);
    multiply<P, kH, stay(kH)>(Left<P>::of(rows), skip + step * (kH * kFragment), sums);
  }

  Left<P> left[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t rows[4];
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&d)[4] = sums[2 * s + i / 2];
        rows[i] = device::pack_pair<Value>(d[i % 2 * 2], d[i % 2 * 2 + 1]);
      }
    } else {
      // Columns 2 t and 2 t + 1 instead of t and t + 4, as the weights are packed.
      rows[0] = device::float_bits(sums[s][0]), rows[1] = device::float_bits(sums[s][2]);
      rows[2] = device::float_bits(sums[s][1]), rows[3] = device::float_bits(sums[s][3]);
    }
    left[s] = Left<P>::of(rows);
  }

  device::sync_warp();  // nobody reads x any more
  const unsigned char* bias = last + a.channel_tiles * (kSteps * kFragment) - lane * (P::kWeights * 4) + pair * 4;
  unsigned char* x = tile + group * a.pitch + pair * static_cast<int>(sizeof(Value));
#pragma unroll kUnroll
  for (int n = 0; n < a.channel_tiles; ++n) {
    const U32x2 first = load_weights<U32x2, stay(kH)>(bias + n * 32);
    float h[1][4] = {{device::bits_float(first.x), device::bits_float(first.y), device::bits_float(first.x),
                      device::bits_float(first.y)}};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      multiply<P, 1, stay(kH)>(left[s], last + (n * kSteps + s) * kFragment, h);
    }
    unsigned char* p = x + n * 8 * static_cast<int>(sizeof(Value));
    gate<Value>(a, n * 8 + pair, h[0][0], h[0][1], p);
    gate<Value>(a, n * 8 + pair, h[0][2], h[0][3], p + 8 * a.pitch);
  }
}

// kH: tiles of 8 hidden channels.
template <typename P, int kH>
ESR_KERNEL(kMostWarps * 32, blocks_of(P::kWeights * 4, kH))
gate_kernel(ESR_ARGUMENT(GateArgs) a) {
  using Value = typename P::Value;
  unsigned char* const shared = device::shared_memory();
  const int thread = device::thread_index(), threads = device::thread_count();
  const int lane = thread & 31, warp = thread >> 5, warps = threads >> 5;

  if constexpr (stay(kH)) {
    for (int i = thread * kUnitBytes; i < a.skip_bytes; i += threads * kUnitBytes) {
      device::copy_async<16>(shared + i, a.skip + i, true);
    }
    for (int i = thread * kUnitBytes; i < a.last_bytes; i += threads * kUnitBytes) {
      device::copy_async<16>(shared + a.skip_bytes + i, a.last + i, true);
    }
    device::commit_copies();
  }
  unsigned char* const tile = shared + a.tiles_at + warp * a.tile_bytes;
  // The odd half of the last step.
  if (a.units % 2 != 0 && lane < kPixels) {
    device::store_shared(tile + lane * a.pitch + a.units * kUnitBytes, U32x4{0, 0, 0, 0});
  }
  const unsigned char* skip = (stay(kH) ? shared : a.skip) + lane * (P::kWeights * 4);
  const unsigned char* last = (stay(kH) ? shared + a.skip_bytes : a.last) + lane * (P::kWeights * 4);
  device::wait_for_previous_grid();
  device::allow_next_grid();

  bool first = true;
  for (int64_t t = device::block_index() * warps + warp;; t += device::grid_size() * warps) {
    const bool exists = t < a.tiles;
    Segment s = {};
    Between start = {};
    if (exists) {
      s = locate(a, static_cast<int>(t));
      start = between(s.x, a.low_width, a.width);
      load_pixels<Value>(a, s, tile);
      load_columns<Value, kH>(a, s, start.first, tile + a.columns_at);
    }
    device::wait_for_copies<0>();
    if (first) {
      device::sync_block();
      first = false;
    } else {
      device::sync_warp();
    }
    if (!exists) break;
    attend<P, kH>(a, start, skip, last, tile);
    device::sync_warp();
    store_pixels<Value>(a, s, tile);
    device::sync_warp();
  }
}

template <typename P>
auto instance(int hidden_tiles) {
  constexpr void (*kInstances[])(GateArgs) = {&gate_kernel<P, 2>, &gate_kernel<P, 4>, &gate_kernel<P, 6>,
                                              &gate_kernel<P, kMostHiddenTiles>};
  return kInstances[hidden_tiles / 2 - 1];
}

// Shared memory of a block.
struct Layout {
  int pitch, columns_at, tile_bytes, tiles_at;

  explicit Layout(const GateWeights& w) {
    // An odd number of units: eight pixels that ldmatrix reads at once fall on different banks. After an odd number of
    // them a unit of zeros.
    pitch = (w.units() % 2 == 0 ? w.units() + 1 : w.units() + 2) * kUnitBytes;
    columns_at = kPixels * pitch;
    tile_bytes = columns_at + kLowColumns * column_pitch(w.hidden_tiles) * 4;
    tiles_at = stay(w.hidden_tiles) ? static_cast<int>(w.skip().weight_bytes()) + w.bytes() : 0;
  }
  int bytes(int warps) const { return tiles_at + warps * tile_bytes; }
};

}  // namespace

Packing GateWeights::skip() const {
  Packing p;
  p.precision = precision;
  p.taps = 1;
  p.slab_units = p.units[0] = units();
  p.channel_tiles = hidden_tiles;
  p.out_channels = hidden;
  return p;
}

GateWeights plan_gate(Precision precision, int32_t channels, int32_t hidden) {
  GateWeights w{precision, channels, hidden, static_cast<int32_t>(ceil_div(hidden, 16) * 2)};
  const int shared_bytes = device::properties().shared_bytes;
  STD_TORCH_CHECK(w.units() <= kMostUnits, "ESA of ", channels, " channels is not supported");
  if (Layout(w).bytes(kMostWarps / 2) > shared_bytes) w.hidden_tiles = kMostHiddenTiles;
  STD_TORCH_CHECK(Layout(w).bytes(1) <= shared_bytes, "ESA of ", channels, " channels does not fit into ", shared_bytes,
                  " bytes of shared memory");
  return w;
}

void launch_gate(GateArgs a, const GateWeights& weights, int64_t batch, device::Stream stream, bool overlap) {
  const device::Properties& gpu = device::properties();
  const Packing skip = weights.skip();
  a.channels = weights.channels;
  a.units = weights.units();
  a.units_reciprocal = (1 << kReciprocalBits) / a.units + 1;
  a.skip_steps = skip.total_steps();
  a.skip_bytes = static_cast<int32_t>(skip.weight_bytes());
  a.channel_tiles = weights.channel_tiles();
  a.last_bytes = weights.bytes();
  a.low_units = static_cast<int32_t>(ceil_div(weights.hidden, unit_channels(weights.precision)));
  a.per_height = 0.5f / static_cast<float>(a.height);
  a.per_width = 0.5f / static_cast<float>(a.width);
  a.segments = static_cast<int32_t>(ceil_div(a.width, kPixels));
  const int64_t tiles = batch * a.height * a.segments;
  constexpr int kLargestSide = 1 << 16;  // (2 i + 1) low < 2^31
  STD_TORCH_CHECK(tiles < INT32_MAX && a.height <= kLargestSide && a.width <= kLargestSide, "ESA of ", batch,
                  " images of ", a.height, "x", a.width, " is too large for one launch");
  a.tiles = static_cast<int32_t>(tiles);
  const Layout layout(weights);
  a.pitch = layout.pitch;
  a.columns_at = layout.columns_at;
  a.tile_bytes = layout.tile_bytes;
  a.tiles_at = layout.tiles_at;

  // Fewer warps where shared memory has no room for two blocks, or for one, or where blocks are too few.
  const int half = std::min(gpu.shared_bytes_in_all / 2 - 1024, gpu.shared_bytes);
  int warps = kMostWarps;
  while (warps > kMostWarps / 2 && layout.bytes(warps) > half) warps /= 2;
  while (warps > 1 && layout.bytes(warps) > gpu.shared_bytes) warps /= 2;
  while (warps > 2 && ceil_div(tiles, warps) < gpu.multiprocessors) warps /= 2;
  device::LaunchShape shape;
  shape.threads = warps * 32;
  shape.instance = weights.hidden_tiles;
  shape.shared_bytes = layout.bytes(warps);
  const int resident = std::min(blocks_of(weights.lane_bytes(), weights.hidden_tiles) * kMostWarps / warps,
                                gpu.shared_bytes_in_all / (shape.shared_bytes + 1024));
  shape.blocks = std::min<int64_t>(ceil_div(tiles, warps), gpu.multiprocessors * std::max(1, resident));

  switch (weights.precision) {
    case Precision::kFloat16:
      return device::launch("esa_gate", instance<Float16>(weights.hidden_tiles), shape, stream, overlap, a);
    case Precision::kBFloat16:
      return device::launch("esa_gate", instance<BFloat16>(weights.hidden_tiles), shape, stream, overlap, a);
    case Precision::kTf32:
      return device::launch("esa_gate", instance<Tf32>(weights.hidden_tiles), shape, stream, overlap, a);
    case Precision::kTf32x3:
      return device::launch("esa_gate", instance<Tf32x3>(weights.hidden_tiles), shape, stream, overlap, a);
  }
}

}  // namespace esr::cuda
