// Single elements of weights, of any dtype and strides.
#pragma once

#include "packing.h"

namespace esr::cuda {

ESR_DEVICE int64_t weight_offset(const WeightView& w, int64_t i0, int64_t i1, int down, int across) {
  const int64_t element = i0 * w.strides[0] + i1 * w.strides[1] + down * w.strides[2] + across * w.strides[3];
  return element * (w.dtype == Dtype::kFloat32 ? 4 : 2);
}

ESR_DEVICE float read_weight(const WeightView& w, int64_t i0, int64_t i1, int down, int across) {
  const unsigned char* p = w.data + weight_offset(w, i0, i1, down, across);
  switch (w.dtype) {
    case Dtype::kFloat16:
      return device::to_float(device::load_global<device::float16>(p));
    case Dtype::kBFloat16:
      return device::to_float(device::load_global<device::bfloat16>(p));
    default:
      return device::load_global<float>(p);
  }
}

// Of a view whose memory may be written.
ESR_DEVICE void write_weight(const WeightView& w, int64_t i0, int64_t i1, int down, int across, float value) {
  unsigned char* p = const_cast<unsigned char*>(w.data) + weight_offset(w, i0, i1, down, across);
  switch (w.dtype) {
    case Dtype::kFloat16:
      return device::store_global(p, device::from_float<device::float16>(value));
    case Dtype::kBFloat16:
      return device::store_global(p, device::from_float<device::bfloat16>(value));
    default:
      return device::store_global(p, value);
  }
}

// Of a 3x3 filter, whose taps are counted row by row, or of a 1x1 one.
ESR_DEVICE float read_weight(const WeightView& w, int64_t i0, int64_t i1, int tap) {
  return read_weight(w, i0, i1, tap / 3, tap % 3);
}
ESR_DEVICE void write_weight(const WeightView& w, int64_t i0, int64_t i1, int tap, float value) {
  write_weight(w, i0, i1, tap / 3, tap % 3, value);
}

}  // namespace esr::cuda
