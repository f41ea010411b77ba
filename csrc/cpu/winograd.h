// 3x3 convolution by Winograd's F(4x4, 3x3) with the points 0, 1, -1, 2, -2: 36 products for 16 pixels instead of 144.
// Included after multiply.h in every path_*.cpp.
//
// A row of 4x4 tiles is done in blocks of kTiles: all input tiles of a block are transformed, then, for each block of
// output channels, 36 small matrix products follow and the transformation back. A block's data stays in the
// second-level cache, and while the products are computed, what comes before and after them is fetched into it. Tiles
// are counted from the image's corner, so a tile's result does not depend on the block it is in. Tiles in which
// something is not finite are computed again, directly.

// A multiple of most pixel blocks: fewer, and the weights are read too often; more, and the products leave the
// first-level cache.
constexpr int64_t kTiles = 12;
constexpr int64_t kTileColumns = 4 * kTiles + 2;  // the input columns under a block
constexpr int64_t kPositions = 36;

// Distance between the 36 planes of a block: an odd number of cache lines, or they would fall on the same cache sets.
ESR_INLINE int64_t plane_stride(int64_t floats) {
  const int64_t lines = (floats + 15) / 16;
  return (lines | 1) * 16;
}

// y = B^T d for six values.
ESR_INLINE void transform_in(const Vec (&d)[6], Vec (&y)[6]) {
  const Vec two = set1(2.0f), four = set1(4.0f), five = set1(5.0f);
  y[0] = fma(four, d[0], fnma(five, d[2], d[4]));
  const Vec even = fnma(four, d[2], d[4]), odd = fnma(four, d[1], d[3]);
  y[1] = add(even, odd);
  y[2] = sub(even, odd);
  const Vec even2 = sub(d[4], d[2]), odd2 = sub(d[3], d[1]);
  y[3] = fma(two, odd2, even2);
  y[4] = fnma(two, odd2, even2);
  y[5] = fma(four, d[1], fnma(five, d[3], d[5]));
}

// y = A^T m for six values.
ESR_INLINE void transform_out(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec sum1 = add(m[1], m[2]), difference1 = sub(m[1], m[2]);
  const Vec sum2 = add(m[3], m[4]), difference2 = sub(m[3], m[4]);
  y[0] = add(add(m[0], sum1), sum2);
  y[1] = fma(set1(2.0f), difference2, difference1);
  y[2] = fma(set1(4.0f), sum2, sum1);
  y[3] = add(fma(set1(8.0f), difference2, difference1), m[5]);
}

// Vectors that fill a cache line: written together.
constexpr int kLineVectors = 16 / kLanes;

// V vectors of channels of up to kTiles tiles, each from the N x N pixels of which the first start at `in`, to plane
// positions `out` + k * plane. N - 4 columns are shared by neighbours, and with them the vertical half.
template <int N, void (*kTransform)(const Vec (&)[N], Vec (&)[6]), int V>
void winograd_tile_channels(const float* in, int64_t pitch, int64_t step, int64_t tiles, float* out, int64_t plane) {
  alignas(64) float half[6 * (4 * kTiles + N - 4) * V * kLanes];  // [transformed row][column][V * lanes]
  const int64_t columns = 4 * tiles + N - 4, row = columns * V * kLanes;
  for (int64_t x = 0; x < columns; ++x) {
    ESR_UNROLL for (int v = 0; v < V; ++v) {
      Vec d[N], y[6];
      ESR_UNROLL for (int i = 0; i < N; ++i) d[i] = load(in + i * pitch + x * step + v * kLanes);
      kTransform(d, y);
      ESR_UNROLL for (int i = 0; i < 6; ++i) store(half + i * row + (x * V + v) * kLanes, y[i]);
    }
  }
  for (int64_t i = 0; i < 6; ++i) {
    const float* from = half + i * row;
    float* to = out + i * 6 * plane;
    for (int64_t t = 0; t < tiles; ++t) {
      ESR_UNROLL for (int v = 0; v < V; ++v) {
        Vec d[N], y[6];
        ESR_UNROLL for (int j = 0; j < N; ++j) d[j] = load(from + (j * V + v) * kLanes);
        kTransform(d, y);
        ESR_UNROLL for (int j = 0; j < 6; ++j) store(to + j * plane + v * kLanes, y[j]);
      }
      from += 4 * V * kLanes;
      to += step;
    }
  }
}

template <int N, void (*kTransform)(const Vec (&)[N], Vec (&)[6])>
void winograd_tiles(const float* in, int64_t pitch, int64_t step, int64_t tiles, float* out, int64_t plane) {
  int64_t c = 0;
  for (; c + kLineVectors * kLanes <= step; c += kLineVectors * kLanes) {
    winograd_tile_channels<N, kTransform, kLineVectors>(in + c, pitch, step, tiles, out + c, plane);
  }
  for (; c < step; c += kLanes) {
    winograd_tile_channels<N, kTransform, 1>(in + c, pitch, step, tiles, out + c, plane);
  }
}

inline void winograd_in(const float* in, int64_t pitch, int64_t step, int64_t tiles, float* out, int64_t plane) {
  winograd_tiles<6, transform_in>(in, pitch, step, tiles, out, plane);
}

// The pixels under a block of tiles that reaches beyond the ring: what lies there counts as zero, and only pixels that
// are not stored depend on it. [6][kTileColumns][step]
inline void copy_edge(const WinogradArgs& a, int64_t y, int64_t x, int64_t tiles, float* patch) {
  for (int64_t i = 0; i < 6; ++i) {
    const float* row = a.in + (y - 1 + i) * a.in_pitch;
    float* out = patch + i * kTileColumns * a.in_step;
    for (int64_t column = x - 1; column < x + 4 * tiles + 1; ++column) {
      const bool inside = y - 1 + i <= a.height && column <= a.width;
      for (int64_t c = 0; c < a.in_step; c += kLanes) {
        store(out + c, inside ? load(row + column * a.in_step + c) : zero());
      }
      out += a.in_step;
    }
  }
}

// The 4x4 pixels of a tile from its 36 sums, planes apart, for V vectors of channels: [4][4][V * lanes].
template <int V>
void winograd_out(const float* sums, int64_t plane, float* pixels) {
  for (int v = 0; v < V; ++v) {
    Vec half[6][4];  // [column][transformed row]
    for (int j = 0; j < 6; ++j) {
      Vec m[6];
      ESR_UNROLL for (int i = 0; i < 6; ++i) m[i] = load(sums + (i * 6 + j) * plane + v * kLanes);
      transform_out(m, half[j]);
    }
    for (int i = 0; i < 4; ++i) {
      Vec m[6], y[4];
      ESR_UNROLL for (int j = 0; j < 6; ++j) m[j] = half[j][i];
      transform_out(m, y);
      ESR_UNROLL for (int x = 0; x < 4; ++x) store(pixels + ((i * 4 + x) * V + v) * kLanes, y[x]);
    }
  }
}

// `count` groups of P tiles.
template <int V, int P>
void winograd_product(const float* in, int64_t step, int64_t cin, const float* weights, const float* bias,
                      float* result, int64_t count) {
  for (; count > 0; --count) {
    Accumulators<V, P> acc;
    if (bias != nullptr) {
      acc.start(bias);
    } else {
      acc.clear();
    }
    acc.multiply(in, step, cin, weights);
    acc.write(result, V * kLanes);
    in += P * step;
    result += P * V * kLanes;
  }
}

// Rows of floats that are needed soon: `next` fetches some lines of them, a step's share, into the second-level cache.
class Prefetcher {
 public:
  Prefetcher(const float* first, int64_t pitch, int64_t rows, int64_t floats, int64_t steps)
      : row_(first),
        pitch_(pitch),
        rows_(rows),
        lines_((floats + 15) / 16),
        share_((lines_ * rows + steps - 1) / steps) {}

  ESR_INLINE void next() {
    for (int64_t left = share_; left > 0 && rows_ > 0;) {
      const int64_t end = lines_ - line_ < left ? lines_ : line_ + left;
      left -= end - line_;
      for (; line_ < end; ++line_) __builtin_prefetch(row_ + line_ * 16, 0, 2);
      if (line_ == lines_) {
        line_ = 0;
        row_ += pitch_;
        --rows_;
      }
    }
  }

 private:
  const float* row_;
  int64_t pitch_, rows_, lines_, share_;
  int64_t line_ = 0;
};

template <int V>
void winograd_products(const WinogradArgs& a, const float* transformed, int64_t plane_in, int64_t tiles,
                       int64_t first_vector, float* products, int64_t plane_out, Prefetcher (&ahead)[3]) {
  constexpr int P = pixel_block<V>();
  const float* weights = a.weights + first_vector * kLanes * kPositions * a.cin;
  for (int64_t k = 0; k < kPositions; ++k) {
    // The product for the point (1, 1) is added once to each of the 16 pixels: it carries the bias.
    const float* bias = k == 7 ? a.bias + first_vector * kLanes : nullptr;
    const float* in = transformed + k * plane_in;
    float* out = products + k * plane_out;
    const int64_t whole = tiles / P, rest = tiles - whole * P;
    winograd_product<V, P>(in, a.in_step, a.cin, weights, bias, out, whole);
    if (rest > 0) {
      with_pixels<P>(rest, [&](auto count) {
        winograd_product<V, decltype(count)::kValue>(in + whole * P * a.in_step, a.in_step, a.cin, weights, bias,
                                                     out + whole * P * V * kLanes, 1);
      });
    }
    weights += a.cin * V * kLanes;
    for (Prefetcher& p : ahead) p.next();
  }
}

// The 4x4 pixels of a tile by the direct sums, for V vectors of channels, those inside the image: [4][4][V * lanes].
// For inputs that are not finite, or too large to be transformed: the transforms would spread them over the tile.
template <int V>
void direct_tile(const WinogradArgs& a, int64_t y0, int64_t x0, int64_t first_vector, float* pixels) {
  const float* const weights = a.direct_weights + first_vector * kLanes * 9 * a.cin;
  const int64_t rows = a.height - y0 < 4 ? a.height - y0 : 4, columns = a.width - x0 < 4 ? a.width - x0 : 4;
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns; ++x) {
      Vec sum[V];
      ESR_UNROLL for (int v = 0; v < V; ++v) sum[v] = load(a.bias + (first_vector + v) * kLanes);
      const float* w = weights;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float* in = a.in + (y0 + y + tap / 3 - 1) * a.in_pitch + (x0 + x + tap % 3 - 1) * a.in_step;
        for (int64_t c = 0; c < a.cin; ++c, w += V * kLanes) {
          ESR_UNROLL for (int v = 0; v < V; ++v) sum[v] = fma(set1(in[c]), load(w + v * kLanes), sum[v]);
        }
      }
      ESR_UNROLL for (int v = 0; v < V; ++v) store(pixels + ((y * 4 + x) * V + v) * kLanes, sum[v]);
    }
  }
}

// 0 in every lane, NaN where one of the tile's 36 sums is not finite: each of them is part of a corner.
template <int V>
ESR_INLINE Vec not_finite(const float* pixels) {
  Vec result = zero();
  ESR_UNROLL for (int v = 0; v < V; ++v) {
    const auto corner = [&](int k) { return load(pixels + (k * V + v) * kLanes); };
    const Vec sum = add(add(corner(0), corner(3)), add(corner(12), corner(15)));
    result = add(result, sub(sum, sum));
  }
  return result;
}

ESR_INLINE bool any_nan(Vec v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i] != lanes[i];
  return found;
}

inline int64_t winograd_scratch_floats(int64_t in_step, int64_t width) {
  const int64_t tiles = (width + 3) / 4 < kTiles ? (width + 3) / 4 : kTiles;
  return kPositions * (plane_stride(tiles * in_step) + plane_stride(tiles * 3 * kLanes)) + 6 * kTileColumns * in_step;
}

// What the products of the first block of channels hide: the block's results, which are about to be written, and its
// residual; and what all of them hide: the input of the next block, to the right or at the start of the next tile row.
ESR_INLINE Prefetcher results_of(const WinogradArgs& a, int64_t y, int64_t x, int64_t rows, int64_t columns) {
  const float* first = a.out + (y - a.out_first_row) * a.out_pitch + x * a.out_step;
  return {first, a.out_pitch, rows, columns * a.out_step, kPositions};
}

ESR_INLINE Prefetcher residual_of(const WinogradArgs& a, int64_t y, int64_t x, int64_t rows, int64_t columns) {
  const Epilogue& e = a.epilogue;
  if (e.residual == nullptr) return {nullptr, 0, 0, 0, 1};
  return {e.residual + y * e.residual_pitch + x * a.out_step, e.residual_pitch, rows, columns * a.out_step, kPositions};
}

ESR_INLINE Prefetcher input_after(const WinogradArgs& a, int64_t y, int64_t t0, int64_t tile_columns) {
  const bool right = t0 + kTiles < tile_columns;
  const int64_t x = right ? 4 * (t0 + kTiles) : 0;
  const int64_t top = right ? y - 1 : y + 5, bottom = right ? y + 5 : y + 9;  // the next tile row shares two rows
  const int64_t rows = (bottom < a.height ? bottom : a.height) - top;
  const int64_t columns = a.width - x < 4 * kTiles ? a.width - x : 4 * kTiles;
  return {a.in + top * a.in_pitch + x * a.in_step, a.in_pitch, rows, columns * a.in_step,
          kPositions * ((a.out_vectors + 2) / 3)};
}

inline void winograd(const WinogradArgs& a, int64_t tile_row0, int64_t tile_row1) {
  const FinishFunction finish = finish_function(a.epilogue);
  const int64_t tile_columns = (a.width + 3) / 4;
  const int64_t most = tile_columns < kTiles ? tile_columns : kTiles;
  const int64_t plane_in = plane_stride(most * a.in_step);
  float* transformed = a.scratch;
  float* products = transformed + kPositions * plane_in;
  float* patch = products + kPositions * plane_stride(most * 3 * kLanes);
  for (int64_t tile_row = tile_row0; tile_row < tile_row1; ++tile_row) {
    const int64_t y = 4 * tile_row;
    for (int64_t t0 = 0; t0 < tile_columns; t0 += kTiles) {
      const int64_t tiles = tile_columns - t0 < kTiles ? tile_columns - t0 : kTiles;
      const int64_t x0 = 4 * t0;
      const float* in = a.in + (y - 1) * a.in_pitch + (x0 - 1) * a.in_step;
      int64_t pitch = a.in_pitch;
      if (y + 4 > a.height || x0 + 4 * tiles > a.width) {
        copy_edge(a, y, x0, tiles, patch);
        in = patch;
        pitch = kTileColumns * a.in_step;
      }
      winograd_in(in, pitch, a.in_step, tiles, transformed, plane_in);
      const int64_t rows = a.height - y < 4 ? a.height - y : 4;
      const int64_t block_columns = a.width - x0 < 4 * tiles ? a.width - x0 : 4 * tiles;
      Prefetcher ahead[3] = {results_of(a, y, x0, rows, block_columns), residual_of(a, y, x0, rows, block_columns),
                             input_after(a, y, t0, tile_columns)};
      for_blocks(a.out_vectors, [&](auto vectors, int64_t first_vector) {
        constexpr int V = decltype(vectors)::kValue;
        const int64_t plane_out = plane_stride(most * V * kLanes);
        winograd_products<V>(a, transformed, plane_in, tiles, first_vector, products, plane_out, ahead);
        const auto finish_tile = [&](int64_t t, const float* pixels) {
          const int64_t x = 4 * (t0 + t);
          const int columns = static_cast<int>(a.width - x < 4 ? a.width - x : 4);
          const int64_t offset = x * a.out_step + first_vector * kLanes;
          float* out = a.out + (y - a.out_first_row) * a.out_pitch + offset;
          const float* residual = a.epilogue.residual;
          if (residual != nullptr) residual += y * a.epilogue.residual_pitch + offset;
          for (int64_t i = 0; i < rows; ++i) {
            finish(pixels + i * 4 * V * kLanes, out, residual, a.out_step, V, columns, a.epilogue.slope);
            out += a.out_pitch;
            if (residual != nullptr) residual += a.epilogue.residual_pitch;
          }
        };
        alignas(64) float pixels[16 * V * kLanes];
        Vec odd = zero();
        for (int64_t t = 0; t < tiles; ++t) {
          winograd_out<V>(products + t * V * kLanes, plane_out, pixels);
          odd = add(odd, not_finite<V>(pixels));
          finish_tile(t, pixels);
        }
        if (any_nan(odd)) {
          for (int64_t t = 0; t < tiles; ++t) {
            winograd_out<V>(products + t * V * kLanes, plane_out, pixels);
            if (!any_nan(not_finite<V>(pixels))) continue;
            direct_tile<V>(a, y, 4 * (t0 + t), first_vector, pixels);
            finish_tile(t, pixels);
          }
        }
      });
    }
  }
}
