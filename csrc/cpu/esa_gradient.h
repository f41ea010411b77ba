// ESA's parts the other way. Included after esa.h in every path_*.cpp.

inline void max_pool_gradient(const MaxPoolGradientArgs& a) {
  for (int64_t y = 0; y < a.height; ++y) {
    for (int64_t x = 0; x < a.width; ++x) {
      for (int64_t c = 0; c < a.step; c += kLanes) {
        const float* window = a.in + 3 * y * a.in_pitch + 3 * x * a.step + c;
        Vec best = load(window), position = zero();
        for (int k = 1; k < 49; ++k) {
          const Vec value = load(window + k / 7 * a.in_pitch + k % 7 * a.step);
          const Vec larger = sub(best, value);  // negative: of equal values the first keeps the gradient
          position = select_negative(larger, set1(static_cast<float>(k)), position);
          best = select_negative(larger, value, best);
        }
        const Vec grad = load(a.grad + y * a.grad_pitch + x * a.step + c);
        float* out = a.out + 3 * y * a.out_pitch + 3 * x * a.step + c;
        for (int k = 0; k < 49; ++k) {
          const Vec here = sub(abs(sub(position, set1(static_cast<float>(k)))), set1(0.5f));
          float* to = out + k / 7 * a.out_pitch + k % 7 * a.step;
          store(to, add(load(to), select_negative(here, grad, zero())));
        }
      }
    }
  }
}

inline void esa_gate_gradient(const EsaGateGradientArgs& a, int64_t y0, int64_t y1) {
  const EsaGateArgs& e = a.gate;
  const EsaRows rows(e, ResidualMode::kNone);
  const Vec one = set1(1.0f);
  for (int64_t y = y0; y < y1; ++y) {
    float* to_z = a.to_z + y * a.to_z_pitch;
    rows.run(y, a.sum + y * a.sum_pitch, to_z);
    float* grad = a.grad + y * a.grad_pitch;
    const float* x = e.x + y * e.x_pitch;
    for (int64_t i = 0; i < e.width * e.x_step; i += kLanes) {
      const Vec s = sigmoid(load(to_z + i)), direct = mul(load(grad + i), s);
      store(to_z + i, mul(mul(direct, sub(one, s)), load(x + i)));
      store(grad + i, direct);
    }
  }
}

inline void shrink(const ShrinkArgs& a) {
  const int64_t floats = a.small_width * a.step;
  for (int64_t y = 0; y < a.small_height; ++y) {
    for (int64_t i = 0; i < floats; i += kLanes) store(a.out + y * a.out_pitch + i, zero());
  }
  const float scale_y = static_cast<float>(a.small_height) / static_cast<float>(a.height);
  const float scale_x = static_cast<float>(a.small_width) / static_cast<float>(a.width);
  const auto share = [](float* low, float* high, Vec g, float weight) {
    store(low, fma(set1(1.0f - weight), g, load(low)));
    store(high, fma(set1(weight), g, load(high)));
  };
  for (int64_t y = 0; y < a.height; ++y) {
    for (int64_t i = 0; i < floats; i += kLanes) store(a.scratch + i, zero());
    for (int64_t x = 0; x < a.width; ++x) {
      const BilinearIndex h = BilinearIndex::make(x, scale_x, a.small_width);
      for (int64_t c = 0; c < a.step; c += kLanes) {
        const Vec g = load(a.in + y * a.in_pitch + x * a.step + c);
        share(a.scratch + h.low * a.step + c, a.scratch + h.high * a.step + c, g, h.weight);
      }
    }
    const BilinearIndex v = BilinearIndex::make(y, scale_y, a.small_height);
    for (int64_t i = 0; i < floats; i += kLanes) {
      share(a.out + v.low * a.out_pitch + i, a.out + v.high * a.out_pitch + i, load(a.scratch + i), v.weight);
    }
  }
}
