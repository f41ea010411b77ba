// 1x1 convolution from planes to planes (NCHW), without the internal layout. Included after epilogue.h in every
// path_*.cpp.

// Of a tile, whose pixels are `tile` and whose channels' pixels lie together, rows [first, first + R) of the result.
template <int R>
void planar1x1_rows(const Planar1x1Args& a, const float* tile, int64_t first, int64_t pixel, int64_t pixels,
                    FinishFunction finish) {
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
      column += Planar1x1Args::kTile;
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

inline void planar1x1(const Planar1x1Args& a, int64_t first_tile, int64_t last_tile) {
  constexpr int64_t kTile = Planar1x1Args::kTile;
  Epilogue epilogue;
  epilogue.activation = a.activation;
  epilogue.slope = a.slope;
  epilogue.mode = a.residual == nullptr ? ResidualMode::kNone : ResidualMode::kPost;
  const FinishFunction finish = finish_function(epilogue);
  // Planes of a power of two lie on the same cache sets; a copied tile does not.
  alignas(64) float tile[Planar1x1Args::kMostChannels * kTile];
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t pixel = t * kTile, pixels = a.pixels - pixel < kTile ? a.pixels - pixel : kTile;
    for (int64_t k = 0; k < a.cin; ++k) {
      const float* from = a.in[k] + pixel;
      float* to = tile + k * kTile;
      int64_t i = 0;
      for (; i + kLanes <= pixels; i += kLanes) store(to + i, load(from + i));
      for (; i < kTile; ++i) to[i] = i < pixels ? from[i] : 0.0f;
    }
    for (int64_t row = 0; row < a.cout; row += kPlanarRows) {
      with_pixels<kPlanarRows>(a.cout - row, [&](auto rows) {
        planar1x1_rows<decltype(rows)::kValue>(a, tile, row, pixel, pixels, finish);
      });
    }
  }
}
