// 1x1 convolution from planes to planes (NCHW), without the internal layout. Included after epilogue.h in every
// path_*.cpp.

// Of a tile, whose channels lie `stride` floats apart, rows [first, first + R) of the result.
template <int R>
void planar1x1_rows(const Planar1x1Args& a, const float* tile, int64_t stride, int64_t first, int64_t pixel,
                    int64_t pixels, FinishFunction finish) {
  constexpr int kVectors = 2;
  constexpr int64_t kStep = kVectors * kLanes;
  alignas(64) float h[R * kStep], rest[R * kStep], skip[R * kStep];
  const float* weights = a.weights + first * a.cin;
  for (int64_t x = 0; x < pixels; x += kStep) {
    Vec sums[R][kVectors];
    ESR_UNROLL for (int r = 0; r < R; ++r) {
      ESR_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = set1(a.bias[first + r]);
    }
    const float* w = weights;
    const float* column = tile + x;
    for (int64_t k = 0; k < a.cin; ++k) {
      Vec in[kVectors];
      ESR_UNROLL for (int v = 0; v < kVectors; ++v) in[v] = load(column + v * kLanes);
      ESR_UNROLL for (int r = 0; r < R; ++r) {
        const Vec s = set1(w[r]);
        ESR_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(in[v], s, sums[r][v]);
      }
      column += stride;
      w += kPlanarRows;
    }
    ESR_UNROLL for (int r = 0; r < R; ++r) {
      ESR_UNROLL for (int v = 0; v < kVectors; ++v) store(h + r * kStep + v * kLanes, sums[r][v]);
    }
    float* out = a.out + first * a.plane + pixel + x;
    const float* residual = a.residual == nullptr ? nullptr : a.residual + first * a.plane + pixel + x;
    const int64_t count = pixels - x < kStep ? pixels - x : kStep;
    if (count == kStep) {
      finish(h, out, residual, a.plane, kVectors, R, a.slope);
      continue;
    }
    // The image ends inside a vector.
    for (int r = 0; r < R; ++r) {
      for (int64_t i = 0; i < kStep; ++i) {
        skip[r * kStep + i] = residual != nullptr && i < count ? residual[r * a.plane + i] : 0.0f;
      }
    }
    finish(h, rest, skip, kStep, kVectors, R, a.slope);
    for (int r = 0; r < R; ++r) {
      for (int64_t i = 0; i < count; ++i) out[r * a.plane + i] = rest[r * kStep + i];
    }
  }
}

inline FinishFunction planar_finish(const Planar1x1Args& a) {
  Epilogue epilogue;
  epilogue.activation = a.activation;
  epilogue.slope = a.slope;
  epilogue.mode = a.mode;
  return finish_function(epilogue);
}

// `pixels` pixels of the result, from `pixel` on.
inline void planar1x1_tile(const Planar1x1Args& a, const float* tile, int64_t stride, int64_t pixel, int64_t pixels) {
  const FinishFunction finish = planar_finish(a);
  for (int64_t row = 0; row < a.cout; row += kPlanarRows) {
    with_pixels<kPlanarRows>(a.cout - row, [&](auto rows) {
      planar1x1_rows<decltype(rows)::kValue>(a, tile, stride, row, pixel, pixels, finish);
    });
  }
}

// Copies `pixels` pixels of a plane, and zeros up to `floats`, a multiple of the lanes.
inline void copy_pixels(const float* from, int64_t pixels, int64_t floats, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) store(to + i, load(from + i));
  for (; i < floats; ++i) to[i] = i < pixels ? from[i] : 0.0f;
}

inline void planar1x1(const Planar1x1Args& a, int64_t first_tile, int64_t last_tile) {
  constexpr int64_t kTile = Planar1x1Args::kTile;
  // Planes of a power of two lie on the same cache sets; a copied tile does not.
  alignas(64) float tile[Planar1x1Args::kMostChannels * kTile];
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t pixel = t * kTile, pixels = a.pixels - pixel < kTile ? a.pixels - pixel : kTile;
    for (int64_t k = 0; k < a.cin; ++k) copy_pixels(a.in[k] + pixel, pixels, kTile, tile + k * kTile);
    planar1x1_tile(a, tile, kTile, pixel, pixels);
  }
}

// Adds the products of `pixels` pixels (a multiple of the lanes) of channels [o, o + O) of g and [i, i + I) of x to
// sums[cout][cin][lanes]: every lane has the sum of every kLanes-th pixel.
template <int O, int I>
void planar_products(const PlanarProductsArgs& a, int64_t o, int64_t i) {
  float* const sums = a.sums + (o * a.cin + i) * kLanes;
  const float *x = a.x + i * a.stride, *g = a.g + o * a.stride;
  Vec acc[O][I];
  ESR_UNROLL for (int r = 0; r < O; ++r) {
    ESR_UNROLL for (int c = 0; c < I; ++c) acc[r][c] = load(sums + (r * a.cin + c) * kLanes);
  }
  for (int64_t p = 0; p < a.pixels; p += kLanes) {
    Vec columns[I];
    ESR_UNROLL for (int c = 0; c < I; ++c) columns[c] = load(x + c * a.stride + p);
    ESR_UNROLL for (int r = 0; r < O; ++r) {
      const Vec row = load(g + r * a.stride + p);
      ESR_UNROLL for (int c = 0; c < I; ++c) acc[r][c] = fma(row, columns[c], acc[r][c]);
    }
  }
  ESR_UNROLL for (int r = 0; r < O; ++r) {
    ESR_UNROLL for (int c = 0; c < I; ++c) store(sums + (r * a.cin + c) * kLanes, acc[r][c]);
  }
}

inline void planar1x1_products(const PlanarProductsArgs& a) {
  for (int64_t i = 0; i < a.cin; i += kProductColumns) {
    with_pixels<kProductColumns>(a.cin - i, [&](auto columns) {
      for (int64_t o = 0; o < a.cout; o += kProductRows) {
        with_pixels<kProductRows>(a.cout - o, [&](auto rows) {
          planar_products<decltype(rows)::kValue, decltype(columns)::kValue>(a, o, i);
        });
      }
    });
  }
  if (a.totals == nullptr) return;
  for (int64_t o = 0; o < a.cout; ++o) {
    Vec total = load(a.totals + o * kLanes);
    for (int64_t p = 0; p < a.pixels; p += kLanes) total = add(total, load(a.g + o * a.stride + p));
    store(a.totals + o * kLanes, total);
  }
}
