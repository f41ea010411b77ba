// exp, sigmoid and the activations on vectors. Included after vec.h in every path_*.cpp.

// exp of every x, side by side, so that no chain of operations waits for itself. Relative error 1.5e-7. Overflows to
// infinity from 88.4 on and is 0 below -87.7, where the exponent's bits are 0; NaN stays NaN.
template <int kCount>
ESR_INLINE void exp(Vec (&x)[kCount]) {
  // Adding 1.5 * 2^23 + 127 rounds to an integer n and leaves n + 127, the biased exponent, in the lowest bits.
  const Vec magic = set1(12582912.0f + 127.0f);
  Vec t[kCount], n[kCount], p[kCount];
  ESR_UNROLL for (int i = 0; i < kCount; ++i) x[i] = vmin(set1(88.75f), vmax(set1(-88.0f), x[i]));
  ESR_UNROLL for (int i = 0; i < kCount; ++i) t[i] = fma(x[i], set1(1.44269504f), magic);
  ESR_UNROLL for (int i = 0; i < kCount; ++i) n[i] = sub(t[i], magic);
  ESR_UNROLL for (int i = 0; i < kCount; ++i) x[i] = fnma(n[i], set1(0.693359375f), x[i]);
  ESR_UNROLL for (int i = 0; i < kCount; ++i) x[i] = fnma(n[i], set1(-2.12194440e-4f), x[i]);
  ESR_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(set1(0.008312501f), x[i], set1(0.04189033f));
  ESR_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], x[i], set1(0.16667116f));
  ESR_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], x[i], set1(0.49999231f));
  ESR_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], x[i], set1(1.0f));
  ESR_UNROLL for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], x[i], set1(1.0f));
  ESR_UNROLL for (int i = 0; i < kCount; ++i) x[i] = mul(p[i], shift_to_exponent(t[i]));
}

ESR_INLINE Vec exp(Vec x) {
  Vec one[1] = {x};
  exp(one);
  return one[0];
}

ESR_INLINE Vec sigmoid(Vec x) {
  const Vec one = set1(1.0f);
  return div(one, add(one, exp(sub(zero(), x))));
}

// x / (1 + exp(-x)): goes to 0 for x -> -inf, as exp overflows to infinity before x does.
ESR_INLINE Vec silu(Vec x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// log(1 + x) for x in [0, 1] by the series of 2 artanh(x / (2 + x)); relative error 2e-7, however small x is.
ESR_INLINE Vec log1p(Vec x) {
  const Vec s = div(x, add(x, set1(2.0f))), q = mul(s, s);
  Vec p = fma(set1(2.0f / 13.0f), q, set1(2.0f / 11.0f));
  p = fma(p, q, set1(2.0f / 9.0f));
  p = fma(p, q, set1(2.0f / 7.0f));
  p = fma(p, q, set1(2.0f / 5.0f));
  p = fma(p, q, set1(2.0f / 3.0f));
  p = fma(p, q, set1(2.0f));
  return mul(s, p);
}

// log(1 + exp(x)), which does not overflow for any x.
ESR_INLINE Vec softplus(Vec x) { return add(vmax(zero(), x), log1p(exp(sub(zero(), abs(x))))); }

// The tail of the normal distribution over exp(-x^2 / 2), after Abramowitz and Stegun 7.1.26; absolute error below
// 1e-7.
ESR_INLINE Vec normal_tail(Vec t) {
  Vec p = fma(set1(0.5f * 1.061405429f), t, set1(-0.5f * 1.453152027f));
  p = fma(p, t, set1(0.5f * 1.421413741f));
  p = fma(p, t, set1(-0.5f * 0.284496736f));
  p = fma(p, t, set1(0.5f * 0.254829592f));
  return mul(p, t);
}

// x * Phi(x).
ESR_INLINE Vec gelu(Vec x) {
  const Vec one = set1(1.0f);
  const Vec t = div(one, fma(set1(0.3275911f * 0.70710678f), abs(x), one));
  const Vec tail = mul(normal_tail(t), exp(mul(mul(x, set1(-0.5f)), x)));
  return mul(x, select_negative(x, tail, sub(one, tail)));
}

// 0.5 * (1 + tanh(u)) is sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
ESR_INLINE Vec gelu_tanh(Vec x) {
  const Vec twice_u = mul(x, fma(mul(x, x), set1(2.0f * 0.79788456f * 0.044715f), set1(2.0f * 0.79788456f)));
  return mul(x, sigmoid(twice_u));
}

template <Activation A>
ESR_INLINE Vec activate(Vec h, Vec slope) {
  if constexpr (A == Activation::kRelu) {
    return vmax(zero(), h);
  } else if constexpr (A == Activation::kLeakyRelu) {
    return fma(slope, vmin(zero(), h), vmax(zero(), h));
  } else if constexpr (A == Activation::kSilu) {
    return silu(h);
  } else if constexpr (A == Activation::kGelu) {
    return gelu(h);
  } else if constexpr (A == Activation::kGeluTanh) {
    return gelu_tanh(h);
  } else {
    return h;
  }
}

// g where the activation's argument is positive, elsewhere `other`.
ESR_INLINE Vec where_positive(Vec h, Vec g, Vec other) { return select_negative(sub(zero(), h), g, other); }

// g times the activation's derivative at h.
template <Activation A>
ESR_INLINE Vec differentiate(Vec h, Vec g, Vec slope) {
  const Vec one = set1(1.0f);
  if constexpr (A == Activation::kRelu) {
    return where_positive(h, g, zero());
  } else if constexpr (A == Activation::kLeakyRelu) {
    return where_positive(h, g, mul(g, slope));
  } else if constexpr (A == Activation::kSilu) {
    const Vec s = sigmoid(h);
    return mul(g, fma(mul(h, s), sub(one, s), s));
  } else if constexpr (A == Activation::kGelu) {
    // Phi(h) + h phi(h)
    const Vec t = div(one, fma(set1(0.3275911f * 0.70710678f), abs(h), one));
    const Vec bell = exp(mul(mul(h, set1(-0.5f)), h));
    const Vec tail = mul(normal_tail(t), bell);
    const Vec phi = select_negative(h, tail, sub(one, tail));
    return mul(g, fma(mul(h, set1(0.39894228f)), bell, phi));
  } else if constexpr (A == Activation::kGeluTanh) {
    const Vec square = mul(h, h);
    const Vec s = sigmoid(mul(h, fma(square, set1(2.0f * 0.79788456f * 0.044715f), set1(2.0f * 0.79788456f))));
    const Vec inner = fma(square, set1(6.0f * 0.79788456f * 0.044715f), set1(2.0f * 0.79788456f));
    return mul(g, fma(mul(mul(h, inner), s), sub(one, s), s));
  } else {
    return g;
  }
}
