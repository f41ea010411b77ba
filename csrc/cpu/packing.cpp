#include "packing.h"

#include <algorithm>

#include "../common/layout.h"

namespace esr {
namespace {

constexpr int64_t kAlignedFloats = 16;

// Packs [cout, cin, taps] to [block][taps][cin][vectors of the block * lanes].
template <typename Values>
PackedFloats pack_dense(const Values& values, int64_t cout, int64_t cin, int64_t taps, int64_t lanes) {
  const int64_t vectors = ceil_div(cout, lanes);
  PackedFloats packed(vectors * lanes * cin * taps);
  float* out = packed.data();
  for (int64_t v = 0; v < vectors; v += next_block(vectors - v)) {
    const int64_t block = next_block(vectors - v) * lanes;
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t i = 0; i < cin; ++i, out += block) {
        for (int64_t o = 0; o < std::min(block, cout - v * lanes); ++o) {
          out[o] = static_cast<float>(values[((v * lanes + o) * cin + i) * taps + t]);
        }
      }
    }
  }
  return packed;
}

}  // namespace

PackedFloats::PackedFloats(int64_t count) : storage_(static_cast<size_t>(count + kAlignedFloats), 0.0f) {
  const auto address = reinterpret_cast<uintptr_t>(storage_.data());
  const uintptr_t bytes = kAlignedFloats * sizeof(float);
  aligned_ = reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
}

PackedFloats pack_conv3x3(const Weight& w, int64_t lanes) {
  return pack_dense(w.values, w.shape[0], w.shape[1], 9, lanes);
}

PackedFloats pack_conv1x1(const Weight& w, int64_t lanes) {
  return pack_dense(w.values, w.shape[0], w.shape[1], 1, lanes);
}

PackedFloats pack_rows(const Weight& w, int64_t rows) {
  const int64_t cout = w.shape[0], cin = w.shape[1];
  PackedFloats packed(ceil_div(cout, rows) * rows * cin);
  for (int64_t o = 0; o < cout; ++o) {
    float* block = packed.data() + o / rows * rows * cin + o % rows;
    for (int64_t i = 0; i < cin; ++i) block[i * rows] = w.values[static_cast<size_t>(o * cin + i)];
  }
  return packed;
}

PackedFloats pack_winograd(const Weight& w, int64_t lanes) {
  constexpr double kG[6][3] = {{0.25, 0.0, 0.0},
                               {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                               {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                               {1.0 / 24, 1.0 / 12, 1.0 / 6},
                               {1.0 / 24, -1.0 / 12, 1.0 / 6},
                               {0.0, 0.0, 1.0}};
  constexpr int64_t kMost = 3 * 16;  // output channels of a block
  const int64_t cout = w.shape[0], cin = w.shape[1], vectors = ceil_div(cout, lanes);
  PackedFloats packed(vectors * lanes * cin * 36);
  float* out = packed.data();
  double g[9][kMost], half[6][3][kMost];
  for (int64_t v = 0; v < vectors; v += next_block(vectors - v)) {
    const int64_t block = next_block(vectors - v) * lanes, filters = std::min(block, cout - v * lanes);
    for (int64_t i = 0; i < cin; ++i) {
      for (int64_t o = 0; o < filters; ++o) {
        const float* from = w.values.data() + ((v * lanes + o) * cin + i) * 9;
        for (int t = 0; t < 9; ++t) g[t][o] = from[t];
      }
      for (int r = 0; r < 6; ++r) {
        for (int c = 0; c < 3; ++c) {
          for (int64_t o = 0; o < filters; ++o) {
            half[r][c][o] = kG[r][0] * g[c][o] + kG[r][1] * g[3 + c][o] + kG[r][2] * g[6 + c][o];
          }
        }
      }
      for (int r = 0; r < 6; ++r) {
        for (int c = 0; c < 6; ++c) {
          float* to = out + ((r * 6 + c) * cin + i) * block;
          const double (&h)[3][kMost] = half[r];
          for (int64_t o = 0; o < filters; ++o) {
            to[o] = static_cast<float>(h[0][o] * kG[c][0] + h[1][o] * kG[c][1] + h[2][o] * kG[c][2]);
          }
        }
      }
    }
    out += 36 * cin * block;
  }
  return packed;
}

PackedFloats pack_depthwise(const Weight& w, int64_t lanes) {
  const int64_t channels = w.shape[0], padded = round_up(channels, lanes);
  PackedFloats packed(9 * padded);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < 9; ++t) packed.data()[t * padded + c] = w.values[c * 9 + t];
  }
  return packed;
}

PackedFloats pack_vector(const float* values, int64_t channels, int64_t lanes) {
  PackedFloats packed(round_up(channels, lanes));
  if (values != nullptr) std::copy(values, values + channels, packed.data());
  return packed;
}

}  // namespace esr
