// What lies between a gradient and the convolutions. Included after epilogue.h in every path_*.cpp.

template <Activation A>
void derivative_of(const DerivativeArgs& a) {
  const Vec slope = set1(a.slope);
  const bool pre = a.mode == ResidualMode::kPre;
  for (int64_t i = 0; i < a.floats; i += kLanes) {
    Vec h = load(a.h + i);
    if (pre) h = add(h, load(a.residual + i));
    store(a.out + i, differentiate<A>(h, load(a.grad + i), slope));
  }
}

// Of (h + r) * (sigmoid(h) - 0.5).
inline void attention_derivative(const DerivativeArgs& a) {
  const Vec one = set1(1.0f), half = set1(0.5f);
  for (int64_t i = 0; i < a.floats; i += kLanes) {
    const Vec h = load(a.h + i), g = load(a.grad + i), s = sigmoid(h);
    const Vec gate = sub(s, half), sum = add(h, load(a.residual + i));
    store(a.out + i, mul(g, fma(mul(sum, s), sub(one, s), gate)));
    if (a.to_residual != nullptr) store(a.to_residual + i, mul(g, gate));
  }
}

inline void derivative(const DerivativeArgs& a) {
  if (a.mode == ResidualMode::kAttention) return attention_derivative(a);
  with_activation(a.activation, [&](auto activation) { derivative_of<decltype(activation)::kValue>(a); });
}

inline void silu_parts(const float* h, float* a, float* d, int64_t floats) {
  const Vec one = set1(1.0f);
  for (int64_t i = 0; i < floats; i += kLanes) {
    const Vec x = load(h + i), s = sigmoid(x), y = mul(x, s);
    store(a + i, y);
    store(d + i, fma(y, sub(one, s), s));
  }
}

inline void add_product(const float* a, const float* b, float* inout, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) store(inout + i, mul(add(load(a + i), load(b + i)), load(inout + i)));
}

// The sum over all pixels of rows [y0, y1), row by row.
inline void sum_rows(const float* in, int64_t pitch, int64_t step, int64_t width, float* out, int64_t y0, int64_t y1) {
  for (int64_t c = 0; c < step; c += kLanes) {
    Vec total = zero();
    for (int64_t y = y0; y < y1; ++y) {
      Vec row = zero();
      for (int64_t x = 0; x < width; ++x) row = add(row, load(in + y * pitch + x * step + c));
      total = add(total, row);
    }
    store(out + c, total);
  }
}
