// A function of every element of a map. Included after math.h in every path_*.cpp.

// low and high belong to the channel. Zeros, as they are where a map has no channel, give zeros there.
template <Function F>
ESR_INLINE Vec function_of(Vec x, Vec low, Vec high) {
  if constexpr (F == Function::kSigmoid) {
    return mul(high, sigmoid(x));
  } else if constexpr (F == Function::kClamp) {
    return vmin(high, vmax(low, x));
  } else if constexpr (F == Function::kHardswish) {
    return mul(x, vmin(set1(1.0f), vmax(zero(), fma(x, set1(1.0f / 6.0f), set1(0.5f)))));
  } else if constexpr (F == Function::kMish) {
    // tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), 1 in float32 from x = 9 on.
    const Vec e = exp(vmin(set1(20.0f), x));
    const Vec n = mul(e, add(e, set1(2.0f)));
    return mul(x, div(n, add(n, set1(2.0f))));
  } else if constexpr (F == Function::kRsqrt) {
    return div(high, vmax(vmax(low, set1(1e-30f)), sqrt(x)));
  } else {
    return activate<static_cast<Activation>(F)>(x, low);
  }
}

template <Function F>
void function_rows(const ActivateArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t x = 0; x < a.width; ++x) {
      const int64_t pixel = y * a.pitch + x * a.step;
      for (int64_t c = 0; c < a.step; c += kLanes) {
        store(a.out + pixel + c, function_of<F>(load(a.x + pixel + c), load(a.low + c), load(a.high + c)));
      }
    }
  }
}

inline void activate_rows(const ActivateArgs& a, int64_t y0, int64_t y1) {
  switch (a.function) {
    case Function::kNone:
      break;  // a layer has one
    case Function::kRelu:
      return function_rows<Function::kRelu>(a, y0, y1);
    case Function::kLeakyRelu:
      return function_rows<Function::kLeakyRelu>(a, y0, y1);
    case Function::kSilu:
      return function_rows<Function::kSilu>(a, y0, y1);
    case Function::kGelu:
      return function_rows<Function::kGelu>(a, y0, y1);
    case Function::kGeluTanh:
      return function_rows<Function::kGeluTanh>(a, y0, y1);
    case Function::kSigmoid:
      return function_rows<Function::kSigmoid>(a, y0, y1);
    case Function::kClamp:
      return function_rows<Function::kClamp>(a, y0, y1);
    case Function::kHardswish:
      return function_rows<Function::kHardswish>(a, y0, y1);
    case Function::kMish:
      return function_rows<Function::kMish>(a, y0, y1);
    case Function::kRsqrt:
      return function_rows<Function::kRsqrt>(a, y0, y1);
  }
}
