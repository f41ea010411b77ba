// The depthwise half of a blueprint-separable convolution. Included after epilogue.h in every path_*.cpp.

template <typename F>
void depthwise_row(const DepthwiseArgs& a, int64_t y) {
  const Vec slope = set1(a.epilogue.slope);
  const float* residual = F::kReadsResidual ? a.epilogue.residual + y * a.epilogue.residual_pitch : nullptr;
  for (int64_t c = 0; c < a.step; c += kLanes) {
    Vec w[9];
    for (int t = 0; t < 9; ++t) w[t] = load(a.weights + t * a.step + c);
    const Vec bias = load(a.bias + c);
    for (int64_t x = 0; x < a.width; ++x) {
      Vec sum = bias;
      for (int ky = 0; ky < 3; ++ky) {
        const float* pixel = a.rows[ky] + x * a.step + c;
        for (int kx = 0; kx < 3; ++kx) sum = fma(load(pixel + kx * a.step), w[ky * 3 + kx], sum);
      }
      const Vec r = F::kReadsResidual ? load(residual + x * a.step + c) : zero();
      store(a.out + x * a.step + c, F::apply(sum, r, slope));
    }
  }
}

inline void depthwise(const DepthwiseArgs& a, int64_t y) {
  with_finish(a.epilogue, [&](auto finish) { depthwise_row<decltype(finish)>(a, y); });
}
