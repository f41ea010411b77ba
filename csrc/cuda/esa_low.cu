// low = conv3x3(max_pool(in, 7, stride 3)) of a small map: one block for a few pixels, the pooled map in shared memory.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "esa.h"
#include "pixel.h"

namespace esr::cuda {
namespace {

constexpr int kTile = 4;                                       // of the result
constexpr int kPooled = kTile + 2;                             // of the pooled map
constexpr int kColumns = (kPooled - 1) * kPoolStride + kPool;  // of the input
constexpr int kMostThreads = 512;

// The larger one, NaN if either is.
ESR_DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

template <typename Value>
ESR_DEVICE void unpack_unit(const U32x4& bits, float (&values)[kUnitBytes / sizeof(Value)]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Value) == 4) {
      values[i] = device::bits_float(words[i]);
    } else {
      device::unpack_pair<Value>(words[i], values[2 * i], values[2 * i + 1]);
    }
  }
}

template <typename Value>
ESR_DEVICE U32x4 pack_unit(const float (&values)[kUnitBytes / sizeof(Value)]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Value) == 4) {
      words[i] = device::float_bits(values[i]);
    } else {
      words[i] = device::pack_pair<Value>(values[2 * i], values[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <typename Value>
ESR_DEVICE void merge(const U32x4& bits, bool first, float (&most)[kUnitBytes / sizeof(Value)]) {
  float values[kUnitBytes / sizeof(Value)];
  unpack_unit<Value>(bits, values);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kUnitBytes / sizeof(Value)); ++i) {
    most[i] = first ? values[i] : larger(most[i], values[i]);
  }
}

ESR_DEVICE void read_four(const U32x4& bits, float (&values)[4]) {
  values[0] = device::bits_float(bits.x), values[1] = device::bits_float(bits.y);
  values[2] = device::bits_float(bits.z), values[3] = device::bits_float(bits.w);
}

// Where a block's tile lies.
struct Place {
  int64_t image;
  int y, x;  // of its first pixel
};

// The largest of seven rows, for every row of windows and every column that the tile's windows read.
template <typename Value>
ESR_DEVICE void pool_rows(const LowArgs& a, const Place& place, unsigned char* columns) {
  const unsigned char* in = a.in.data + place.image * a.in.image;
  for (int i = device::thread_index(); i < kPooled * kColumns * a.units; i += device::thread_count()) {
    const int pixel = i / a.units, unit = i - pixel * a.units;
    const int y = place.y - 1 + pixel / kColumns, x = (place.x - 1) * kPoolStride + pixel % kColumns;
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(a.height)) continue;
    if (static_cast<unsigned>(x) >= static_cast<unsigned>(a.in_width)) continue;
    const unsigned char* p = in + y * kPoolStride * a.in.row + x * a.in.pixel + unit * kUnitBytes;
    U32x4 rows[kPool];
#pragma unroll
    for (int j = 0; j < kPool; ++j) rows[j] = device::load_global<U32x4>(p + j * a.in.row);
    float most[kUnitBytes / sizeof(Value)];
#pragma unroll
    for (int j = 0; j < kPool; ++j) merge<Value>(rows[j], j == 0, most);
    device::store_shared(columns + i * kUnitBytes, pack_unit<Value>(most));
  }
}

// The largest of seven columns: the pooled map in float32, zeros around it and in what fills up the last unit.
template <typename Value>
ESR_DEVICE void pool_columns(const LowArgs& a, const Place& place, const unsigned char* columns, int pitch,
                             unsigned char* pooled) {
  constexpr int kChannels = kUnitBytes / sizeof(Value);
  for (int i = device::thread_index(); i < kPooled * kPooled * a.units; i += device::thread_count()) {
    const int pixel = i / a.units, unit = i - pixel * a.units, r = pixel / kPooled, c = pixel % kPooled;
    const bool inside = static_cast<unsigned>(place.y - 1 + r) < static_cast<unsigned>(a.height) &&
                        static_cast<unsigned>(place.x - 1 + c) < static_cast<unsigned>(a.width);
    float most[kChannels] = {};
    if (inside) {
      const unsigned char* p = columns + ((r * kColumns + c * kPoolStride) * a.units + unit) * kUnitBytes;
#pragma unroll
      for (int j = 0; j < kPool; ++j) {
        merge<Value>(device::load_shared<U32x4>(p + j * a.units * kUnitBytes), j == 0, most);
      }
    }
#pragma unroll
    for (int k = 0; k < kChannels; k += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = unit * kChannels + k + j < a.hidden ? device::float_bits(most[k + j]) : 0;
      }
      device::store_shared(pooled + pixel * pitch + (unit * kChannels + k) * 4,
                           U32x4{words[0], words[1], words[2], words[3]});
    }
  }
}

// Four channels of a pixel of the result.
template <typename Value>
ESR_DEVICE void store_four(const LowArgs& a, int64_t image, int y, int x, int c, const float (&values)[4]) {
  unsigned char* p =
      a.out.data + image * a.out.image + y * a.out.row + x * a.out.pixel + c * static_cast<int64_t>(sizeof(Value));
  if constexpr (sizeof(Value) == 4) {
    device::store_global(p, U32x4{device::float_bits(values[0]), device::float_bits(values[1]),
                                  device::float_bits(values[2]), device::float_bits(values[3])});
  } else {
    device::store_global(
        p, U32x2{device::pack_pair<Value>(values[0], values[1]), device::pack_pair<Value>(values[2], values[3])});
  }
}

// Two neighbouring pixels and four output channels for four lanes, which share the input channels.
template <typename Value, bool kStay>
ESR_DEVICE void convolve(const LowArgs& a, const Place& place, int pitch, const unsigned char* shared) {
  const LowWeights p{a.hidden};
  const int fours = p.fours(), inputs = (a.hidden + 3) / 4;
  for (int i = device::thread_index(); i < kTile * kTile / 2 * fours * 4; i += device::thread_count()) {
    const int s = i & 3, pair = (i >> 2) / fours, four = (i >> 2) - pair * fours;
    const int row = pair / (kTile / 2), column = pair % (kTile / 2) * 2;
    float sums[2][4] = {};
    for (int group = 0; group * 4 + s < inputs; ++group) {
      const unsigned char* corner =
          shared + a.pooled_at + (row * kPooled + column) * pitch + (group * 4 + s) * kUnitBytes;
#pragma unroll 1
      for (int dy = 0; dy < 3; ++dy) {
        float in[4][4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          read_four(device::load_shared<U32x4>(corner + (dy * kPooled + c) * pitch), in[c]);
        }
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int tap = dy * 3 + dx;
            const int at = ((((tap * 4 + k) * p.groups() + group) * fours + four) * 4 + s) * kUnitBytes;
            float w[4];
            read_four(load_weights<U32x4, kStay>((kStay ? shared : a.weights) + at), w);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              sums[0][j] = fmaf(in[dx][k], w[j], sums[0][j]);
              sums[1][j] = fmaf(in[dx + 1][k], w[j], sums[1][j]);
            }
          }
        }
      }
    }
    float bias[4], values[4];
    read_four(device::load_global<U32x4>(a.weights + p.weight_bytes() + four * kUnitBytes), bias);
    const int c = four * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        sums[m][j] += device::shuffle_xor(sums[m][j], 1);
        sums[m][j] += device::shuffle_xor(sums[m][j], 2);
      }
      values[j] = (s == 0 ? sums[0][j] : sums[1][j]) + bias[j];
      if (a.relu) values[j] = values[j] < 0.0f ? 0.0f : values[j];  // NaN stays
      if (c + j >= a.hidden) values[j] = 0.0f;
    }
    const int y = place.y + row, x = place.x + column + s;
    const bool exists = s < 2 && y < a.height && x < a.width;
    if (exists && c * static_cast<int>(sizeof(Value)) < a.units * kUnitBytes) {
      store_four<Value>(a, place.image, y, x, c, values);
    }
  }
}

// kStay: shared memory has room for the weights, at its start.
template <typename Value, bool kStay>
ESR_KERNEL(kMostThreads, 1)
low_kernel(ESR_ARGUMENT(LowArgs) a) {
  unsigned char* const shared = device::shared_memory();
  const LowWeights weights{a.hidden};
  if constexpr (kStay) {
    for (int i = device::thread_index() * kUnitBytes; i < weights.weight_bytes();
         i += device::thread_count() * kUnitBytes) {
      device::copy_async<16>(shared + i, a.weights + i, true);
    }
    device::commit_copies();
  }
  device::wait_for_previous_grid();
  device::allow_next_grid();

  const int tile = static_cast<int>(device::block_index()), per_image = a.tiles_across * a.tiles_down;
  const int image = tile / per_image, rest = tile - image * per_image, down = rest / a.tiles_across;
  const Place place = {image, down * kTile, (rest - down * a.tiles_across) * kTile};
  const int pitch = weights.fours() * kUnitBytes;  // bytes of a pixel of the pooled map
  pool_rows<Value>(a, place, shared + a.columns_at);
  device::sync_block();
  pool_columns<Value>(a, place, shared + a.columns_at, pitch, shared + a.pooled_at);
  device::wait_for_copies<0>();
  device::sync_block();
  convolve<Value, kStay>(a, place, pitch, shared);
}

template <typename Value>
auto instance(bool stay) {
  return stay ? &low_kernel<Value, true> : &low_kernel<Value, false>;
}

}  // namespace

void launch_low(LowArgs a, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  const device::Properties& gpu = device::properties();
  const LowWeights weights{a.hidden};
  a.units = static_cast<int32_t>(ceil_div(a.hidden, unit_channels(precision)));
  a.tiles_across = static_cast<int32_t>(ceil_div(a.width, kTile));
  a.tiles_down = static_cast<int32_t>(ceil_div(a.height, kTile));
  const int columns = kPooled * kColumns * a.units * kUnitBytes;
  const int pooled = kPooled * kPooled * weights.fours() * kUnitBytes;
  const bool stay = weights.weight_bytes() + columns + pooled <= gpu.shared_bytes;
  a.columns_at = stay ? weights.weight_bytes() : 0;
  a.pooled_at = a.columns_at + columns;
  device::LaunchShape shape;
  shape.blocks = int64_t{a.tiles_across} * a.tiles_down * batch;
  STD_TORCH_CHECK(shape.blocks < INT32_MAX, "ESA of ", batch, " images is too large for one launch");
  // One item of the longest loop for each thread.
  shape.threads = std::min<int>(kMostThreads, static_cast<int>(round_up(kPooled * kColumns * a.units, 32)));
  shape.shared_bytes = a.pooled_at + pooled;
  shape.instance = stay;
  switch (precision) {
    case Precision::kFloat16:
      return device::launch("esa_low", instance<device::float16>(stay), shape, stream, overlap, a);
    case Precision::kBFloat16:
      return device::launch("esa_low", instance<device::bfloat16>(stay), shape, stream, overlap, a);
    default:
      return device::launch("esa_low", instance<float>(stay), shape, stream, overlap, a);
  }
}

}  // namespace esr::cuda
