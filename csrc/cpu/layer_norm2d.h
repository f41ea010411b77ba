// Layer normalisation over the channels of every pixel of outside tensors, in their own memory format. The variance is
// the mean of squared differences from the mean, in a second pass. Included after boundary.h in every path_*.cpp.

// Sums over the lanes of kLanes vectors: the k-th in lane k.
ESR_INLINE Vec lane_sums(Vec (&v)[kLanes]) {
  transpose(v);
  Vec total = v[0];
  ESR_UNROLL for (int k = 1; k < kLanes; ++k) total = add(total, v[k]);
  return total;
}

ESR_INLINE Vec inverse_deviation(Vec squares, const LayerNormArgs& a) {
  const Vec variance = div(squares, set1(static_cast<float>(a.channels)));
  return div(set1(1.0f), sqrt(add(variance, set1(a.eps))));
}

ESR_INLINE int lanes_left(int64_t n) { return static_cast<int>(n < kLanes ? n : kLanes); }

// --- NCHW: a vector is kLanes pixels of a channel --------------------------------------------------------------------

// Reads `n` pixels of every channel from pixel (y, x) on; the lines' last vectors are filled up with zeros.
inline void read_planes(const TensorView& t, int64_t channels, int64_t y, int64_t x, int64_t n, float* lines) {
  for (int64_t c = 0; c < channels; ++c) {
    float* line = lines + c * kNormPixels;
    if (n % kLanes != 0) store(line + n / kLanes * kLanes, zero());
    read_line(element(t, c, y, x), t.dtype, t.column_stride, n, line);
  }
}

inline void write_planes(const float* lines, const TensorView& t, int64_t channels, int64_t y, int64_t x, int64_t n) {
  for (int64_t c = 0; c < channels; ++c) {
    write_line(lines + c * kNormPixels, n, element(t, c, y, x), t.dtype, t.column_stride);
  }
}

// Of the vector of pixels at `x`: mean and 1 / sqrt(variance + eps).
ESR_INLINE void plane_statistics(const LayerNormArgs& a, const float* x, Vec& mean, Vec& inverse) {
  // Two chains of additions, for their latency.
  Vec even = zero(), odd = zero();
  int64_t c = 0;
  for (; c + 2 <= a.channels; c += 2) {
    even = add(even, load(x + c * kNormPixels));
    odd = add(odd, load(x + (c + 1) * kNormPixels));
  }
  if (c < a.channels) even = add(even, load(x + c * kNormPixels));
  mean = div(add(even, odd), set1(static_cast<float>(a.channels)));
  even = odd = zero();
  for (c = 0; c + 2 <= a.channels; c += 2) {
    const Vec d0 = sub(load(x + c * kNormPixels), mean), d1 = sub(load(x + (c + 1) * kNormPixels), mean);
    even = fma(d0, d0, even);
    odd = fma(d1, d1, odd);
  }
  if (c < a.channels) {
    const Vec d = sub(load(x + c * kNormPixels), mean);
    even = fma(d, d, even);
  }
  inverse = inverse_deviation(add(even, odd), a);
}

// `n` pixels, at most kNormPixels, of row y from pixel x on.
inline void norm_planes(const LayerNormArgs& a, int64_t y, int64_t x, int64_t n) {
  float* const lines = a.scratch;
  read_planes(a.in, a.channels, y, x, n, lines);
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec mean, inverse;
    plane_statistics(a, lines + i, mean, inverse);
    for (int64_t c = 0; c < a.channels; ++c) {
      float* v = lines + c * kNormPixels + i;
      store(v, fma(mul(sub(load(v), mean), inverse), set1(a.weight[c]), set1(a.bias[c])));
    }
  }
  write_planes(lines, a.out, a.channels, y, x, n);
}

// The same pixels' gradients; adds those to weight and bias to `sums`, [2][channels][kLanes].
inline void norm_planes_gradient(const LayerNormGradientArgs& args, int64_t y, int64_t x, int64_t n) {
  const LayerNormArgs& a = args.norm;
  float* const lines = a.scratch;
  float* const grads = lines + a.channels * kNormPixels;
  read_planes(a.in, a.channels, y, x, n, lines);
  read_planes(args.grad, a.channels, y, x, n, grads);
  const Vec channels = set1(static_cast<float>(a.channels));
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec mean, inverse, g_sum = zero(), gy_sum = zero();
    plane_statistics(a, lines + i, mean, inverse);
    const int pixels = lanes_left(n - i);
    for (int64_t c = 0; c < a.channels; ++c) {
      float* v = lines + c * kNormPixels + i;
      const float* grad = grads + c * kNormPixels + i;
      const Vec normal = mul(sub(load(v), mean), inverse), g = mul(load(grad), set1(a.weight[c]));
      store(v, normal);
      g_sum = add(g_sum, g);
      gy_sum = fma(g, normal, gy_sum);
      // Not the lanes behind the last pixel, whose deviation may be none.
      float* to_weight = args.sums + c * kLanes;
      float* to_bias = to_weight + a.channels * kLanes;
      store(to_weight, fma(load_partial(v, pixels), load_partial(grad, pixels), load(to_weight)));
      store(to_bias, add(load(grad), load(to_bias)));
    }
    const Vec g_mean = div(g_sum, channels), gy_mean = div(gy_sum, channels);
    for (int64_t c = 0; c < a.channels; ++c) {
      float* v = lines + c * kNormPixels + i;
      const Vec g = mul(load(grads + c * kNormPixels + i), set1(a.weight[c]));
      store(v, mul(fnma(load(v), gy_mean, sub(g, g_mean)), inverse));
    }
  }
  if (args.to_x.data != nullptr) write_planes(lines, args.to_x, a.channels, y, x, n);
}

// --- channels_last: a vector is kLanes channels of a pixel -----------------------------------------------------------

// Calls f(first channel, how many of the vector's channels there are).
template <typename F>
ESR_INLINE void for_vectors(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, static_cast<int>(kLanes));
  if (c < channels) f(c, static_cast<int>(channels - c));
}

// kLanes pixels at a time, so that sums over lanes are sums of vectors; `step` floats from a pixel to the next.
struct PixelBlock {
  const float* x = nullptr;
  int64_t step = 0;
  int count = 0;

  ESR_INLINE Vec get(int p, int64_t c, int n) const {
    const float* v = x + p * step + c;
    return n == kLanes ? load(v) : load_partial(v, n);
  }
};

// Pixels from (y, x) on: where they are if they are float32, else as floats in `memory`.
ESR_INLINE PixelBlock pixel_block(const TensorView& t, int64_t channels, int64_t y, int64_t x, int count,
                                  float* memory) {
  if (t.dtype == Dtype::kFloat32) {
    return {reinterpret_cast<const float*>(element(t, 0, y, x)), t.column_stride, count};
  }
  for (int p = 0; p < count; ++p) read_line(element(t, 0, y, x + p), t.dtype, 1, channels, memory + p * channels);
  return {memory, channels, count};
}

// Each pixel's mean and 1 / sqrt(variance + eps), in the lanes of a vector.
ESR_INLINE void pixel_statistics(const LayerNormArgs& a, const PixelBlock& in, float* means, float* inverses) {
  Vec part[kLanes];
  for (int p = 0; p < kLanes; ++p) {
    Vec total = zero();
    if (p < in.count) for_vectors(a.channels, [&](int64_t c, int n) { total = add(total, in.get(p, c, n)); });
    part[p] = total;
  }
  store(means, div(lane_sums(part), set1(static_cast<float>(a.channels))));
  for (int p = 0; p < kLanes; ++p) {
    Vec total = zero();
    if (p < in.count) {
      const Vec mean = set1(means[p]);
      for_vectors(a.channels, [&](int64_t c, int n) {
        const Vec d = sub(in.get(p, c, n), mean);
        const Vec counted = n < kLanes ? keep_lanes(d, n) : d;  // lanes without a channel are none
        total = fma(counted, counted, total);
      });
    }
    part[p] = total;
  }
  store(inverses, inverse_deviation(lane_sums(part), a));
}

inline void norm_pixels(const LayerNormArgs& a, int64_t y, int64_t x, int64_t n) {
  alignas(64) float means[kLanes], inverses[kLanes];
  for (int64_t i = x; i < x + n; i += kLanes) {
    const PixelBlock in = pixel_block(a.in, a.channels, y, i, lanes_left(x + n - i), a.scratch);
    pixel_statistics(a, in, means, inverses);
    for (int p = 0; p < in.count; ++p) {
      const Vec mean = set1(means[p]), inverse = set1(inverses[p]);
      char* to = element(a.out, 0, y, i + p);
      for_vectors(a.channels, [&](int64_t c, int k) {
        const Vec v = fma(mul(sub(in.get(p, c, k), mean), inverse), load(a.weight + c), load(a.bias + c));
        store_elements(to + c * element_bytes(a.out.dtype), a.out.dtype, v, k);
      });
    }
  }
}

// Adds the gradients to weight and bias to `sums`, [2][channels, filled up to whole vectors].
inline void norm_pixels_gradient(const LayerNormGradientArgs& args, int64_t y, int64_t x, int64_t n) {
  const LayerNormArgs& a = args.norm;
  const int64_t step = (a.channels + kLanes - 1) / kLanes * kLanes;
  const Vec channels = set1(static_cast<float>(a.channels));
  alignas(64) float means[kLanes], inverses[kLanes], g_means[kLanes], gy_means[kLanes];
  for (int64_t i = x; i < x + n; i += kLanes) {
    const int count = lanes_left(x + n - i);
    const PixelBlock in = pixel_block(a.in, a.channels, y, i, count, a.scratch);
    const PixelBlock grad = pixel_block(args.grad, a.channels, y, i, count, a.scratch + kLanes * a.channels);
    pixel_statistics(a, in, means, inverses);
    Vec g_part[kLanes], gy_part[kLanes];
    for (int p = 0; p < kLanes; ++p) {
      Vec g_sum = zero(), gy_sum = zero();
      if (p < count) {
        const Vec mean = set1(means[p]), inverse = set1(inverses[p]);
        for_vectors(a.channels, [&](int64_t c, int k) {
          const Vec normal = mul(sub(in.get(p, c, k), mean), inverse), raw = grad.get(p, c, k);
          const Vec g = mul(raw, load(a.weight + c));
          g_sum = add(g_sum, g);
          gy_sum = fma(g, normal, gy_sum);
          float* to_weight = args.sums + c;
          float* to_bias = to_weight + step;
          store(to_weight, fma(raw, normal, load(to_weight)));
          store(to_bias, add(raw, load(to_bias)));
        });
      }
      g_part[p] = g_sum;
      gy_part[p] = gy_sum;
    }
    if (args.to_x.data == nullptr) continue;
    store(g_means, div(lane_sums(g_part), channels));
    store(gy_means, div(lane_sums(gy_part), channels));
    for (int p = 0; p < count; ++p) {
      const Vec mean = set1(means[p]), inverse = set1(inverses[p]);
      const Vec g_mean = set1(g_means[p]), gy_mean = set1(gy_means[p]);
      char* to = element(args.to_x, 0, y, i + p);
      for_vectors(a.channels, [&](int64_t c, int k) {
        const Vec normal = mul(sub(in.get(p, c, k), mean), inverse);
        const Vec g = mul(grad.get(p, c, k), load(a.weight + c));
        const Vec v = mul(fnma(normal, gy_mean, sub(g, g_mean)), inverse);
        store_elements(to + c * element_bytes(args.to_x.dtype), args.to_x.dtype, v, k);
      });
    }
  }
}
