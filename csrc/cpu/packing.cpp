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

PackedFloats pack_winograd(const Weight& w, int64_t lanes) {
  constexpr double kG[6][3] = {{0.25, 0.0, 0.0},
                               {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                               {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                               {1.0 / 24, 1.0 / 12, 1.0 / 6},
                               {1.0 / 24, -1.0 / 12, 1.0 / 6},
                               {0.0, 0.0, 1.0}};
  const int64_t filters = w.shape[0] * w.shape[1];
  std::vector<double> transformed(static_cast<size_t>(filters) * 36);
  for (int64_t f = 0; f < filters; ++f) {
    const float* g = w.values.data() + f * 9;
    double half[6][3];
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 3; ++j) {
        half[i][j] = kG[i][0] * g[j] + kG[i][1] * g[3 + j] + kG[i][2] * g[6 + j];
      }
    }
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        transformed[f * 36 + i * 6 + j] = half[i][0] * kG[j][0] + half[i][1] * kG[j][1] + half[i][2] * kG[j][2];
      }
    }
  }
  return pack_dense(transformed, w.shape[0], w.shape[1], 36, lanes);
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
