// Geometry shared by the packing code and the kernels.
#pragma once

#include <cstdint>

namespace esr {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A feature map of one image: NHWC float32, channels padded to whole vectors, surrounded by one ring of zero pixels, so
// that a 3x3 convolution needs no bounds checks.
struct MapLayout {
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t step = 0;   // floats from a pixel to the next: channels, padded
  int64_t pitch = 0;  // floats from a row to the next

  static MapLayout make(int64_t channels, int64_t height, int64_t width, int64_t lanes) {
    MapLayout m{channels, height, width, round_up(channels, lanes), 0};
    m.pitch = (width + 2) * m.step;
    return m;
  }
  int64_t floats() const { return (height + 2) * pitch; }
  // Offset of pixel (0, 0) from the start of the ring.
  int64_t origin() const { return pitch + step; }
};

// Output channels are computed in blocks of two vectors, an odd count ends in one block of three (or is a single one):
// never a lone vector after a pair, which would be bound by loads.
constexpr int64_t next_block(int64_t vectors_left) {
  return vectors_left == 3 ? 3 : (vectors_left >= 2 ? 2 : vectors_left);
}

}  // namespace esr
