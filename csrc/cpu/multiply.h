// The inner loop of every dense kernel: a block of pixels times a block of output channels, held in registers.
// Included after vec.h in every path_*.cpp.

template <int V, int P>
struct Accumulators {
  Vec a[P][V];

  ESR_INLINE void start(const float* bias) {
    ESR_UNROLL for (int v = 0; v < V; ++v) {
      const Vec b = load(bias + v * kLanes);
      ESR_UNROLL for (int p = 0; p < P; ++p) a[p][v] = b;
    }
  }

  ESR_INLINE void clear() {
    ESR_UNROLL for (int v = 0; v < V; ++v) { ESR_UNROLL for (int p = 0; p < P; ++p) a[p][v] = zero(); }
  }

  // Adds `depth` channels of P pixels, `step` floats apart, times weights [depth][V * lanes]. The order of additions to
  // a pixel does not depend on P, so a pixel's result depends on nothing but its inputs.
  ESR_INLINE void multiply(const float* pixels, int64_t step, int64_t depth, const float* weights) {
    // One pointer for three pixels: x86 addresses pointer, pointer + step and pointer + 2 step without further
    // registers.
    constexpr int kGroups = (P + 2) / 3;
    const float* group[kGroups];
    ESR_UNROLL for (int g = 0; g < kGroups; ++g) group[g] = pixels + 3 * g * step;
    for (int64_t k = 0; k < depth; ++k) {
      Vec w[V];
      ESR_UNROLL for (int v = 0; v < V; ++v) w[v] = load(weights + v * kLanes);
      ESR_UNROLL for (int p = 0; p < P; ++p) {
        const Vec x = set1(group[p / 3][(p % 3) * step]);
        ESR_UNROLL for (int v = 0; v < V; ++v) a[p][v] = fma(x, w[v], a[p][v]);
      }
      weights += V * kLanes;
      ESR_UNROLL for (int g = 0; g < kGroups; ++g)++ group[g];
    }
  }

  ESR_INLINE void read(const float* from, int64_t step) {
    ESR_UNROLL for (int p = 0; p < P; ++p) {
      ESR_UNROLL for (int v = 0; v < V; ++v) a[p][v] = load(from + p * step + v * kLanes);
    }
  }

  // Adds P adjacent values of x times V vectors of g, for `depth` pixels `x_step` and `g_step` floats apart.
  ESR_INLINE void outer(const float* x, int64_t x_step, const float* g, int64_t g_step, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      Vec w[V];
      ESR_UNROLL for (int v = 0; v < V; ++v) w[v] = load(g + v * kLanes);
      ESR_UNROLL for (int p = 0; p < P; ++p) {
        const Vec s = set1(x[p]);
        ESR_UNROLL for (int v = 0; v < V; ++v) a[p][v] = fma(s, w[v], a[p][v]);
      }
      x += x_step;
      g += g_step;
    }
  }

  ESR_INLINE void write(float* out, int64_t step) const {
    ESR_UNROLL for (int p = 0; p < P; ++p) {
      ESR_UNROLL for (int v = 0; v < V; ++v) store(out + p * step + v * kLanes, a[p][v]);
    }
  }
};

template <int V>
constexpr int pixel_block() {
  return V == 1 ? kPixels1 : (V == 2 ? kPixels2 : kPixels3);
}

// Calls f(Constant<int, P>) for a number of pixels from 1 to kMax.
template <int kMax, typename F>
ESR_INLINE void with_pixels(int64_t pixels, const F& f) {
  if constexpr (kMax > 1) {
    if (pixels < kMax) return with_pixels<kMax - 1>(pixels, f);
  }
  f(Constant<int, kMax>{});
}

// Calls f(Constant<int, V>, first vector) for each block of output channels.
template <typename F>
ESR_INLINE void for_blocks(int64_t vectors, const F& f) {
  for (int64_t v = 0; v < vectors;) {
    const int64_t n = next_block(vectors - v);
    if (n == 3) {
      f(Constant<int, 3>{}, v);
    } else if (n == 2) {
      f(Constant<int, 2>{}, v);
    } else {
      f(Constant<int, 1>{}, v);
    }
    v += n;
  }
}
