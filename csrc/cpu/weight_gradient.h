// Gradients of convolution weights. Included after winograd.h in every path_*.cpp.

// Adds (or, the first time, writes) the products of `depth` pairs of pixels to sums[cin][g_step].
inline void outer_products(const float* x, int64_t x_step, int64_t cin, const float* g, int64_t g_step, int64_t depth,
                           bool first, float* sums) {
  for_blocks(g_step / kLanes, [&](auto vectors, int64_t first_vector) {
    constexpr int V = decltype(vectors)::kValue;
    constexpr int P = pixel_block<V>();
    const int64_t o = first_vector * kLanes;
    for (int64_t i = 0; i < cin; i += P) {
      with_pixels<P>(cin - i < P ? cin - i : P, [&](auto count) {
        Accumulators<V, decltype(count)::kValue> acc;
        if (first) {
          acc.clear();
        } else {
          acc.read(sums + i * g_step + o, g_step);
        }
        acc.outer(x + i, x_step, g + o, g_step, depth);
        acc.write(sums + i * g_step + o, g_step);
      });
    }
  });
}

inline void weight_gradient(const WeightGradientArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    float* sums = a.out;
    for (int64_t ky = 0; ky < a.side; ++ky) {
      for (int64_t kx = 0; kx < a.side; ++kx) {
        const float* x = a.x + y * a.x_row_step + ky * a.x_pitch + kx * a.x_step;
        outer_products(x, a.x_pixel_step, a.cin, a.g + y * a.g_pitch, a.g_step, a.width, y == y0, sums);
        sums += a.cin * a.g_step;
      }
    }
  }
}

// Winograd F(4x4, 3x3) the other way: with Y = A^T [(G w G^T) . (B^T x B)] A the gradient to w is
// G^T [(A dY A^T) . (B^T x B)] G, and the products can be summed over all tiles before the outer G.

// y = A m for four values.
ESR_INLINE void transform_gradient(const Vec (&m)[4], Vec (&y)[6]) {
  const Vec even = add(m[0], m[2]), odd = add(m[1], m[3]);
  y[0] = m[0];
  y[1] = add(even, odd);
  y[2] = sub(even, odd);
  const Vec even2 = fma(set1(4.0f), m[2], m[0]), odd2 = fma(set1(8.0f), m[3], add(m[1], m[1]));
  y[3] = add(even2, odd2);
  y[4] = sub(even2, odd2);
  y[5] = m[3];
}

// y = G^T m for six values.
ESR_INLINE void transform_weight(const Vec (&m)[6], Vec (&y)[3]) {
  const Vec sum1 = add(m[1], m[2]), difference1 = sub(m[2], m[1]);
  const Vec sum2 = add(m[3], m[4]), difference2 = sub(m[3], m[4]);
  y[0] = fma(set1(0.25f), m[0], fma(set1(1.0f / 24), sum2, mul(set1(-1.0f / 6), sum1)));
  y[1] = fma(set1(1.0f / 12), difference2, mul(set1(1.0f / 6), difference1));
  y[2] = add(fma(set1(1.0f / 6), sum2, mul(set1(-1.0f / 6), sum1)), m[5]);
}

inline void winograd_gradient(const float* in, int64_t pitch, int64_t step, int64_t tiles, float* out, int64_t plane) {
  winograd_tiles<4, transform_gradient>(in, pitch, step, tiles, out, plane);
}

// `rows` x `columns` pixels from (y, x) on, of which those from (height, width) on are zero: [rows][columns][step].
inline void copy_patch(const float* in, int64_t pitch, int64_t step, int64_t y, int64_t x, int64_t rows,
                       int64_t columns, int64_t height, int64_t width, float* patch) {
  for (int64_t i = y; i < y + rows; ++i) {
    for (int64_t j = x; j < x + columns; ++j) {
      const bool inside = i < height && j < width;
      for (int64_t c = 0; c < step; c += kLanes)
        store(patch + c, inside ? load(in + i * pitch + j * step + c) : zero());
      patch += step;
    }
  }
}

// [3][3] values from the 36 sums of V vectors.
inline void winograd_weight(const float* sums, int64_t plane, float* out, int64_t tap) {
  Vec half[6][3];
  for (int j = 0; j < 6; ++j) {
    Vec m[6];
    ESR_UNROLL for (int i = 0; i < 6; ++i) m[i] = load(sums + (i * 6 + j) * plane);
    transform_weight(m, half[j]);
  }
  for (int i = 0; i < 3; ++i) {
    Vec m[6], y[3];
    ESR_UNROLL for (int j = 0; j < 6; ++j) m[j] = half[j][i];
    transform_weight(m, y);
    ESR_UNROLL for (int k = 0; k < 3; ++k) store(out + (i * 3 + k) * tap, y[k]);
  }
}

// Tiles are collected over rows, until there are enough for a product.
constexpr int64_t kCollected = 2 * kTiles;

// Of a block of a row.
ESR_INLINE int64_t most_tiles(int64_t width) {
  const int64_t columns = (width + 3) / 4;
  return columns < kTiles ? columns : kTiles;
}

// That whole blocks of a row leave room for.
ESR_INLINE int64_t most_collected(int64_t width) { return kCollected / most_tiles(width) * most_tiles(width); }

inline int64_t winograd_weight_scratch_floats(int64_t cin, int64_t x_step, int64_t g_step, int64_t width) {
  const int64_t tiles = most_collected(width);
  const int64_t planes = plane_stride(tiles * x_step) + plane_stride(tiles * g_step) + plane_stride(cin * g_step);
  return kPositions * planes + 6 * kTileColumns * (x_step > g_step ? x_step : g_step);
}

inline void winograd_weight_gradient(const WeightGradientArgs& a, int64_t tile_row0, int64_t tile_row1) {
  const int64_t tile_columns = (a.width + 3) / 4, most = most_tiles(a.width);
  const int64_t room = most_collected(a.width);
  const int64_t plane_x = plane_stride(room * a.x_step), plane_g = plane_stride(room * a.g_step);
  const int64_t plane = plane_stride(a.cin * a.g_step);
  float* const x = a.scratch;
  float* const g = x + kPositions * plane_x;
  float* const sums = g + kPositions * plane_g;
  float* const patch = sums + kPositions * plane;
  int64_t collected = 0;
  bool first = true;
  for (int64_t tile_row = tile_row0; tile_row < tile_row1; ++tile_row) {
    const int64_t y = 4 * tile_row;
    for (int64_t t0 = 0; t0 < tile_columns; t0 += kTiles) {
      const int64_t tiles = tile_columns - t0 < kTiles ? tile_columns - t0 : kTiles;
      const int64_t column = 4 * t0;
      const bool edge = y + 4 > a.height || column + 4 * tiles > a.width;
      const float* from = a.x + y * a.x_row_step + column * a.x_pixel_step;
      int64_t pitch = a.x_pitch;
      if (edge) {
        copy_patch(a.x, a.x_pitch, a.x_step, y, column, 6, 4 * tiles + 2, a.height + 2, a.width + 2, patch);
        from = patch;
        pitch = (4 * tiles + 2) * a.x_step;
      }
      winograd_in(from, pitch, a.x_step, tiles, x + collected * a.x_step, plane_x);
      from = a.g + y * a.g_pitch + column * a.g_step;
      pitch = a.g_pitch;
      if (edge) {
        copy_patch(a.g, a.g_pitch, a.g_step, y, column, 4, 4 * tiles, a.height, a.width, patch);
        from = patch;
        pitch = 4 * tiles * a.g_step;
      }
      winograd_gradient(from, pitch, a.g_step, tiles, g + collected * a.g_step, plane_g);
      collected += tiles;
      const bool last = tile_row + 1 == tile_row1 && t0 + tiles == tile_columns;
      if (collected + most <= room && !last) continue;
      for (int64_t k = 0; k < kPositions; ++k) {
        outer_products(x + k * plane_x, a.x_step, a.cin, g + k * plane_g, a.g_step, collected, first, sums + k * plane);
      }
      first = false;
      collected = 0;
    }
  }
  const int64_t tap = a.cin * a.g_step;
  for (int64_t i = 0; i < tap; i += kLanes) winograd_weight(sums + i, plane, a.out + i, tap);
}
