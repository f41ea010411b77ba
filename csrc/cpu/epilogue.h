// Activation and residual, applied to results on their way to memory. Included after math.h in every path_*.cpp.

// Calls f with the activation as a Constant.
template <typename F>
ESR_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(Constant<Activation, Activation::kRelu>{});
    case Activation::kLeakyRelu:
      return f(Constant<Activation, Activation::kLeakyRelu>{});
    case Activation::kSilu:
      return f(Constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return f(Constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(Constant<Activation, Activation::kGeluTanh>{});
    default:
      return f(Constant<Activation, Activation::kNone>{});
  }
}

// The kind of epilogue as a type; h is the convolution's result, r the residual.
template <Activation A, ResidualMode M>
struct Finish {
  static constexpr bool kReadsResidual = M != ResidualMode::kNone;

  static ESR_INLINE Vec apply(Vec h, Vec r, Vec slope) {
    if constexpr (M == ResidualMode::kPre) {
      return activate<A>(add(h, r), slope);
    } else if constexpr (M == ResidualMode::kPost) {
      return add(activate<A>(h, slope), r);
    } else if constexpr (M == ResidualMode::kAttention) {
      return mul(add(h, r), sub(sigmoid(h), set1(0.5f)));
    } else if constexpr (M == ResidualMode::kGate) {
      return mul(r, sigmoid(h));
    } else {
      return activate<A>(h, slope);
    }
  }
};

// How a gradient passes an activation: h is the gradient to it, r its derivative.
struct Product {
  static constexpr bool kReadsResidual = true;

  static ESR_INLINE Vec apply(Vec h, Vec r, Vec) { return mul(h, r); }
};

// Calls f with the Finish type of an epilogue.
template <typename F>
ESR_INLINE void with_finish(const Epilogue& e, const F& f) {
  if (e.product) return f(Product{});
  const auto by_activation = [&](auto mode) {
    constexpr ResidualMode kMode = decltype(mode)::kValue;
    with_activation(e.activation, [&](auto activation) { f(Finish<decltype(activation)::kValue, kMode>{}); });
  };
  switch (e.mode) {
    case ResidualMode::kPre:
      return by_activation(Constant<ResidualMode, ResidualMode::kPre>{});
    case ResidualMode::kPost:
      return by_activation(Constant<ResidualMode, ResidualMode::kPost>{});
    case ResidualMode::kAttention:
      return f(Finish<Activation::kNone, ResidualMode::kAttention>{});
    case ResidualMode::kGate:
      return f(Finish<Activation::kNone, ResidualMode::kGate>{});
    default:
      return by_activation(Constant<ResidualMode, ResidualMode::kNone>{});
  }
}

// Finishes `pixels` pixels of `vectors` vectors each: from `h` (dense) to `out`, whose pixels, as the residual's, are
// `step` floats apart.
using FinishFunction = void (*)(const float* h, float* out, const float* residual, int64_t step, int vectors,
                                int pixels, float slope);

template <typename F>
void finish_pixels(const float* h, float* out, const float* residual, int64_t step, int vectors, int pixels,
                   float slope) {
  const Vec s = set1(slope);
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) {
      const Vec r = F::kReadsResidual ? load(residual + v * kLanes) : zero();
      store(out + v * kLanes, F::apply(load(h), r, s));
      h += kLanes;
    }
    out += step;
    if (F::kReadsResidual) residual += step;
  }
}

inline FinishFunction finish_function(const Epilogue& e) {
  FinishFunction result = nullptr;
  with_finish(e, [&](auto finish) { result = &finish_pixels<decltype(finish)>; });
  return result;
}
