// Eight channels of one pixel: how maps of any layout are read and written.
#pragma once

#include "device.h"
#include "view.h"

namespace esr::cuda {

using device::U32x2;
using device::U32x4;

// Calls `function` with a value of the type that maps of this precision are of.
template <typename Function>
void with_value(Precision precision, const Function& function) {
  switch (precision) {
    case Precision::kFloat16:
      return function(device::float16{});
    case Precision::kBFloat16:
      return function(device::bfloat16{});
    default:
      return function(0.0f);
  }
}

// Where channel `c` of output pixel (y, x) of an image lies, in a map or, `shuffle` > 1, in the shuffled image.
ESR_DEVICE int64_t position(const View& v, int shuffle, int y, int x, int c) {
  if (shuffle == 1) return y * v.row + x * v.pixel + c * v.channel;
  const int square = shuffle * shuffle;
  const int colour = c / square, rest = c - colour * square, i = rest / shuffle, j = rest - i * shuffle;
  return (static_cast<int64_t>(y) * shuffle + i) * v.row + (static_cast<int64_t>(x) * shuffle + j) * v.pixel +
         colour * v.channel;
}

// Eight channels of one pixel as float32; those the map does not have are zeros.
template <typename Value>
ESR_DEVICE void read_channels(const View& v, int shuffle, int64_t image, int y, int x, int c, int channels,
                              float (&values)[8]) {
  const unsigned char* p = v.data + image * v.image;
  if (v.blocked && shuffle == 1) {
    p += y * v.row + x * v.pixel + c * static_cast<int64_t>(sizeof(Value));
#pragma unroll
    for (int u = 0; u < static_cast<int>(sizeof(Value)) / 2; ++u) {
      constexpr int kChannels = kUnitBytes / sizeof(Value);
      U32x4 bits = {0, 0, 0, 0};
      if (c + u * kChannels < channels) bits = device::load_global<U32x4>(p + u * kUnitBytes);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(Value) == 4) {
          values[u * 4 + i] = device::bits_float(words[i]);
        } else {
          device::unpack_pair<Value>(words[i], values[2 * i], values[2 * i + 1]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = 0.0f;
    if (c + i < channels) {
      values[i] = device::to_float(device::load_global<Value>(p + position(v, shuffle, y, x, c + i)));
    }
  }
}

template <typename Value>
ESR_DEVICE void write_channels(const View& v, int shuffle, int64_t image, int y, int x, int c, int channels,
                               const float (&values)[8]) {
  unsigned char* p = v.data + image * v.image;
  constexpr int kValue = sizeof(Value);
  if (v.blocked && shuffle == 1) {
    p += y * v.row + x * v.pixel + c * static_cast<int64_t>(kValue);
    if constexpr (kValue == 4) {
      using device::float_bits;
      if (c < channels) {
        device::store_global(
            p, U32x4{float_bits(values[0]), float_bits(values[1]), float_bits(values[2]), float_bits(values[3])});
      }
      if (c + 4 < channels) {
        device::store_global(p + kUnitBytes, U32x4{float_bits(values[4]), float_bits(values[5]), float_bits(values[6]),
                                                   float_bits(values[7])});
      }
    } else if (c < channels) {
      using device::pack_pair;
      device::store_global(p, U32x4{pack_pair<Value>(values[0], values[1]), pack_pair<Value>(values[2], values[3]),
                                    pack_pair<Value>(values[4], values[5]), pack_pair<Value>(values[6], values[7])});
    }
    return;
  }
  // Four values of a row of the image lie side by side.
  if (shuffle == 4 && v.pixel == kValue && v.row % (4 * kValue) == 0 && v.channel % (4 * kValue) == 0 &&
      v.image % (4 * kValue) == 0 && reinterpret_cast<uintptr_t>(v.data) % (4 * kValue) == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (c + 4 * h >= channels) continue;
      unsigned char* to = p + position(v, 4, y, x, c + 4 * h);
      const float* w = values + 4 * h;
      if constexpr (kValue == 4) {
        device::store_global(to, U32x4{device::float_bits(w[0]), device::float_bits(w[1]), device::float_bits(w[2]),
                                       device::float_bits(w[3])});
      } else {
        device::store_global(to, U32x2{device::pack_pair<Value>(w[0], w[1]), device::pack_pair<Value>(w[2], w[3])});
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (c + i < channels) {
      device::store_global(p + position(v, shuffle, y, x, c + i), device::from_float<Value>(values[i]));
    }
  }
}

}  // namespace esr::cuda
