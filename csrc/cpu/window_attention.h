// Attention of the pixels of a window, head by head, between maps as they are in memory. A vector is kLanes queries, in
// which nothing has to be summed up: scores are [keys][queries], results [channels][queries].
// Included after boundary.h in every path_*.cpp.

constexpr int kQueryVectors = 2;  // at once

// 2^x for x <= 0: relative error 2e-7, 0 from -126.5 on; NaN stays NaN.
ESR_INLINE Vec exp2_of_negative(Vec x) {
  constexpr double kLn2 = 0.69314718055994530942;
  constexpr float k2 = static_cast<float>(0.49999231 * kLn2 * kLn2);
  constexpr float k3 = static_cast<float>(0.16667116 * kLn2 * kLn2 * kLn2);
  constexpr float k4 = static_cast<float>(0.04189033 * kLn2 * kLn2 * kLn2 * kLn2);
  constexpr float k5 = static_cast<float>(0.008312501 * kLn2 * kLn2 * kLn2 * kLn2 * kLn2);
  // As in exp(): n + 127 in the lowest bits.
  const Vec magic = set1(12582912.0f + 127.0f);
  x = vmax(set1(-127.0f), x);
  const Vec t = add(x, magic);
  const Vec r = sub(x, sub(t, magic));
  Vec p = fma(set1(k5), r, set1(k4));
  p = fma(p, r, set1(k3));
  p = fma(p, r, set1(k2));
  p = fma(p, r, set1(static_cast<float>(kLn2)));
  p = fma(p, r, set1(1.0f));
  return mul(p, shift_to_exponent(t));
}

// Sizes of what a window of one head is copied to.
struct WindowSizes {
  int64_t tokens, depth;
  int64_t stride;  // floats from a channel to the next; a few more than tokens, for few strides are a power of two then
  int64_t step;    // floats from a pixel to the next

  explicit WindowSizes(const WindowAttentionArgs& a)
      : tokens(a.window_height * a.window_width),
        depth(a.depth),
        stride((tokens + kLanes - 1) / kLanes * kLanes + kLanes),
        step((depth + kLanes - 1) / kLanes * kLanes) {}
  int64_t planes() const { return step * stride; }  // floats of [channels][tokens] and of [tokens][channels]
};

inline int64_t window_attention_stride(const WindowAttentionArgs& a) { return WindowSizes(a).stride; }

inline int64_t window_attention_floats(const WindowAttentionArgs& a) {
  const WindowSizes s(a);
  const int64_t masked = a.mask == 0.0f ? 0 : (s.tokens + 1) * s.stride;
  return 6 * s.planes() + s.tokens * kQueryVectors * kLanes + masked;
}

// Where a window lies, seen from the map's corner after the roll.
struct WindowPlace {
  int64_t y, x;

  WindowPlace(const WindowAttentionArgs& a, int64_t window) {
    const int64_t columns = a.width / a.window_width;
    y = window / columns * a.window_height;
    x = window % columns * a.window_width;
  }

  // f(first token, y, x, n) for runs of n pixels side by side in the map, in the order of tokens.
  template <typename F>
  ESR_INLINE void runs(const WindowAttentionArgs& a, const F& f) const {
    int64_t column = x + a.shift_x, row = y + a.shift_y;
    if (column >= a.width) column -= a.width;
    if (row >= a.height) row -= a.height;
    const int64_t left = a.width - column, n = left < a.window_width ? left : a.window_width;
    for (int64_t i = 0; i < a.window_height; ++i) {
      f(i * a.window_width, row, column, n);
      if (n < a.window_width) f(i * a.window_width + n, row, int64_t{0}, a.window_width - n);
      if (++row == a.height) row = 0;
    }
  }
};

ESR_INLINE bool has_pixels(const TensorView& t) { return t.channel_stride == 1 && t.column_stride != 1; }

// n adjacent elements to floats; writes whole vectors.
ESR_INLINE void read_run(const char* p, Dtype d, int64_t n, float* out) {
  const int64_t bytes = element_bytes(d);
  for (int64_t i = 0; i < n; i += kLanes) {
    store(out + i, load_elements(p + i * bytes, d, static_cast<int>(n - i < kLanes ? n - i : kLanes)));
  }
}

ESR_INLINE void write_run(const float* in, int64_t n, char* p, Dtype d) {
  const int64_t bytes = element_bytes(d);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_elements(p + i * bytes, d, load(in + i), static_cast<int>(n - i < kLanes ? n - i : kLanes));
  }
}

// Transposes [rows][columns], both written in whole vectors.
inline void turn(const float* in, int64_t in_step, int64_t rows, int64_t columns, float* out, int64_t out_step) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int count = static_cast<int>(rows - r < kLanes ? rows - r : kLanes);
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = k < count ? load(in + (r + k) * in_step + c) : zero();
      transpose(block);
      const int taken = static_cast<int>(columns - c < kLanes ? columns - c : kLanes);
      for (int k = 0; k < taken; ++k) store(out + (c + k) * out_step + r, block[k]);
    }
  }
}

// A window of a head's channels as [channels][tokens], or as [tokens][channels], in the order that the tensor has.
inline void read_window(const WindowAttentionArgs& a, const WindowSizes& s, const TensorView& t, WindowPlace place,
                        int64_t channel, float* out) {
  if (has_pixels(t)) {
    place.runs(a, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        read_run(element(t, channel, y, x + i), t.dtype, s.depth, out + (token + i) * s.step);
      }
    });
    return;
  }
  const bool floats = t.dtype == Dtype::kFloat32 && t.column_stride == 1;
  for (int64_t c = 0; c < s.depth; ++c) {
    float* const plane = out + c * s.stride;
    place.runs(a, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
      const char* const from = element(t, channel + c, y, x);
      if (floats) {
        const float* const values = reinterpret_cast<const float*>(from);
        __builtin_prefetch(values + n);  // of the next window
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(plane + token + i, load(values + i));
        if (i < n) store(plane + token + i, load_partial(values + i, static_cast<int>(n - i)));
      } else if (t.column_stride == 1) {
        read_run(from, t.dtype, n, plane + token);
      } else {
        read_line(from, t.dtype, t.column_stride, n, plane + token);
      }
    });
    // Queries behind the last one are computed too.
    for (int64_t i = s.tokens; i < s.stride; ++i) plane[i] = 0.0f;
  }
}

// `other` has as many floats as `out`.
inline void read_planes(const WindowAttentionArgs& a, const WindowSizes& s, const TensorView& t, WindowPlace place,
                        int64_t channel, float* out, float* other) {
  read_window(a, s, t, place, channel, has_pixels(t) ? other : out);
  if (has_pixels(t)) turn(other, s.step, s.tokens, s.depth, out, s.stride);
}

inline void read_pixels(const WindowAttentionArgs& a, const WindowSizes& s, const TensorView& t, WindowPlace place,
                        int64_t channel, float* out, float* other) {
  read_window(a, s, t, place, channel, has_pixels(t) ? out : other);
  if (!has_pixels(t)) turn(other, s.stride, s.depth, s.tokens, out, s.step);
}

inline void write_window(const WindowAttentionArgs& a, const WindowSizes& s, const float* planes, WindowPlace place,
                         int64_t channel, float* other) {
  const TensorView& t = a.out;
  if (has_pixels(t)) {
    turn(planes, s.stride, s.depth, s.tokens, other, s.step);
    place.runs(a, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        write_run(other + (token + i) * s.step, s.depth, element(t, channel, y, x + i), t.dtype);
      }
    });
    return;
  }
  for (int64_t c = 0; c < s.depth; ++c) {
    const float* const plane = planes + c * s.stride;
    place.runs(a, [&](int64_t token, int64_t y, int64_t x, int64_t n) {
      char* const to = element(t, channel + c, y, x);
      if (t.column_stride == 1) {
        write_run(plane + token, n, to, t.dtype);
      } else {
        write_line(plane + token, n, to, t.dtype, t.column_stride);
      }
    });
  }
}

// Each token's vector times `scale`, of length 1 before where `cosine`.
inline void scale_tokens(const WindowSizes& s, bool cosine, float scale, float* planes) {
  for (int64_t i = 0; i < s.tokens; i += kLanes) {
    Vec factor = set1(scale);
    if (cosine) {
      Vec squares = zero();
      for (int64_t c = 0; c < s.depth; ++c) {
        const Vec x = load(planes + c * s.stride + i);
        squares = fma(x, x, squares);
      }
      factor = div(factor, vmax(set1(1e-12f), sqrt(squares)));
    }
    for (int64_t c = 0; c < s.depth; ++c) {
      float* const x = planes + c * s.stride + i;
      store(x, mul(load(x), factor));
    }
  }
}

// Of R keys and N vectors of queries: what they score, and the largest of it so far.
template <int R, int N>
void window_scores(const WindowSizes& s, const float* q, const float* k, const float* bias, float* scores,
                   Vec (&most)[N]) {
  Vec sums[R][N];
  ESR_UNROLL for (int r = 0; r < R; ++r) {
    ESR_UNROLL for (int n = 0; n < N; ++n) {
      sums[r][n] = bias == nullptr ? zero() : load(bias + r * s.stride + n * kLanes);
    }
  }
  for (int64_t c = 0; c < s.depth; ++c) {
    Vec in[N];
    ESR_UNROLL for (int n = 0; n < N; ++n) in[n] = load(q + n * kLanes);
    ESR_UNROLL for (int r = 0; r < R; ++r) {
      const Vec key = set1(k[r]);
      ESR_UNROLL for (int n = 0; n < N; ++n) sums[r][n] = fma(in[n], key, sums[r][n]);
    }
    q += s.stride;
    k += s.stride;
  }
  ESR_UNROLL for (int n = 0; n < N; ++n) {
    // Two chains, for their latency.
    Vec even = most[n], odd = most[n];
    for (int r = 0; r < R; ++r) store(scores + (r * N + n) * kLanes, sums[r][n]);
    for (int r = 0; r + 1 < R; r += 2) {
      even = vmax(sums[r][n], even);
      odd = vmax(sums[r + 1][n], odd);
    }
    if (R % 2 != 0) even = vmax(sums[R - 1][n], even);
    most[n] = vmax(even, odd);
  }
}

// R channels of the results of N vectors of queries.
template <int R, int N>
void window_results(const WindowSizes& s, const float* weights, const float* v, const Vec (&inverse)[N],
                    const float* residual, float* out) {
  Vec sums[R][N];
  ESR_UNROLL for (int r = 0; r < R; ++r) { ESR_UNROLL for (int n = 0; n < N; ++n) sums[r][n] = zero(); }
  for (int64_t j = 0; j < s.tokens; ++j) {
    Vec in[N];
    ESR_UNROLL for (int n = 0; n < N; ++n) in[n] = load(weights + n * kLanes);
    ESR_UNROLL for (int r = 0; r < R; ++r) {
      const Vec value = set1(v[r]);
      ESR_UNROLL for (int n = 0; n < N; ++n) sums[r][n] = fma(in[n], value, sums[r][n]);
    }
    weights += N * kLanes;
    v += s.step;
  }
  ESR_UNROLL for (int r = 0; r < R; ++r) {
    ESR_UNROLL for (int n = 0; n < N; ++n) {
      const int64_t at = r * s.stride + n * kLanes;
      const Vec y = mul(sums[r][n], inverse[n]);
      store(out + at, residual == nullptr ? y : add(y, load(residual + at)));
    }
  }
}

// N vectors of queries.
template <int N>
void attend(const WindowSizes& s, const float* q, const float* k, const float* v, const float* bias,
            const float* residual, float* scores, float* out) {
  Vec most[N], total[N];
  for (int n = 0; n < N; ++n) {
    most[n] = set1(-__builtin_inff());
    total[n] = zero();
  }
  for (int64_t j = 0; j < s.tokens; j += kPlanarRows) {
    const float* const of_keys = bias == nullptr ? nullptr : bias + j * s.stride;
    with_pixels<kPlanarRows>(s.tokens - j, [&](auto rows) {
      window_scores<decltype(rows)::kValue, N>(s, q, k + j, of_keys, scores + j * N * kLanes, most);
    });
  }
  for (int64_t j = 0; j < s.tokens; ++j) {
    ESR_UNROLL for (int n = 0; n < N; ++n) {
      float* const score = scores + (j * N + n) * kLanes;
      const Vec weight = exp2_of_negative(sub(load(score), most[n]));
      store(score, weight);
      total[n] = add(total[n], weight);
    }
  }
  for (int n = 0; n < N; ++n) total[n] = div(set1(1.0f), total[n]);
  for (int64_t c = 0; c < s.depth; c += kPlanarRows) {
    const float* const rest = residual == nullptr ? nullptr : residual + c * s.stride;
    with_pixels<kPlanarRows>(s.depth - c, [&](auto rows) {
      window_results<decltype(rows)::kValue, N>(s, scores, v + c, total, rest, out + c * s.stride);
    });
  }
}

// The bias with `mask` added between pixels that were neighbours only after the roll: [keys][queries].
inline void masked_bias(const WindowAttentionArgs& a, const WindowSizes& s, WindowPlace place, const float* bias,
                        float* regions, float* out) {
  for (int64_t i = 0; i < s.stride; ++i) {
    const int64_t y = place.y + i / a.window_width, x = place.x + i % a.window_width;
    regions[i] = (y + a.shift_y >= a.height ? 2.0f : 0.0f) + (x + a.shift_x >= a.width ? 1.0f : 0.0f);
  }
  for (int64_t j = 0; j < s.tokens; ++j) {
    const Vec own = set1(regions[j]);
    for (int64_t i = 0; i < s.tokens; i += kLanes) {
      const Vec apart = sub(zero(), abs(sub(load(regions + i), own)));
      const Vec value = select_negative(apart, set1(a.mask), zero());
      store(out + j * s.stride + i, bias == nullptr ? value : add(value, load(bias + j * s.stride + i)));
    }
  }
}

inline void window_attention(const WindowAttentionArgs& a, int64_t window, int64_t head) {
  const WindowSizes s(a);
  const WindowPlace place(a, window);
  float* const q = a.scratch;
  float* const k = q + s.planes();
  float* const v = k + s.planes();
  float* const rest = v + s.planes();
  float* const out = rest + s.planes();
  float* const other = out + s.planes();
  float* const scores = other + s.planes();
  float* const masked = scores + s.tokens * kQueryVectors * kLanes;
  const int64_t channel = head * a.depth;
  read_planes(a, s, a.q, place, channel, q, other);
  read_planes(a, s, a.k, place, channel, k, other);
  read_pixels(a, s, a.v, place, channel, v, other);
  if (a.residual.data != nullptr) read_planes(a, s, a.residual, place, channel, rest, other);
  scale_tokens(s, a.cosine, a.scales[head], q);
  if (a.cosine) scale_tokens(s, true, 1.0f, k);
  const float* bias = a.bias == nullptr ? nullptr : a.bias + head * s.tokens * s.stride;
  const bool wraps = place.y + a.window_height + a.shift_y > a.height || place.x + a.window_width + a.shift_x > a.width;
  if (a.mask != 0.0f && wraps) {
    masked_bias(a, s, place, bias, masked, masked + s.stride);
    bias = masked + s.stride;
  }
  for (int64_t i = 0; i < s.tokens;) {
    const bool pair = s.tokens - i > kLanes;
    const auto step = pair ? attend<kQueryVectors> : attend<1>;
    step(s, q + i, k, v, bias == nullptr ? nullptr : bias + i, a.residual.data == nullptr ? nullptr : rest + i, scores,
         out + i);
    i += pair ? kQueryVectors * kLanes : kLanes;
  }
  write_window(a, s, out, place, channel, other);
}
