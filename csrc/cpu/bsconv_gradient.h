// The gradient of a depthwise filter. Included after vec.h in every path_*.cpp.

inline void depthwise_gradient(const DepthwiseGradientArgs& a, int64_t y0, int64_t y1) {
  for (int64_t c = 0; c < a.step; c += kLanes) {
    Vec total[9];
    for (Vec& t : total) t = zero();
    for (int64_t y = y0; y < y1; ++y) {
      const float* g = a.g + y * a.g_pitch + c;
      const float* x = a.x + y * a.x_pitch + c;
      Vec row[9];
      for (Vec& t : row) t = zero();
      for (int64_t i = 0; i < a.width; ++i) {
        const Vec grad = load(g + i * a.step);
        ESR_UNROLL for (int t = 0; t < 9; ++t) {
          row[t] = fma(load(x + t / 3 * a.x_pitch + (i + t % 3) * a.step), grad, row[t]);
        }
      }
      for (int t = 0; t < 9; ++t) total[t] = add(total[t], row[t]);
    }
    for (int t = 0; t < 9; ++t) store(a.out + t * a.step + c, total[t]);
  }
}

inline void add_to(float* sums, const float* values, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) store(sums + i, add(load(sums + i), load(values + i)));
}
