// 1x1 convolution of the concatenation of several feature maps. Included after multiply.h in every path_*.cpp.

template <int V, int P>
void conv1x1_pixels(const Conv1x1Args& a, int64_t y, int64_t x, const float* weights, const float* bias,
                    float* result) {
  Accumulators<V, P> acc;
  acc.start(bias);
  for (int64_t i = 0; i < a.inputs; ++i) {
    acc.multiply(a.in[i] + y * a.in_pitch[i] + x * a.in_step[i], a.in_step[i], a.cin[i], weights);
    weights += a.cin[i] * V * kLanes;
  }
  acc.write(result, V * kLanes);
}

inline void conv1x1_row(const Conv1x1Args& a, int64_t y, FinishFunction finish) {
  int64_t depth = 0;
  for (int64_t i = 0; i < a.inputs; ++i) depth += a.cin[i];
  for_blocks(a.out_vectors, [&](auto vectors, int64_t first_vector) {
    constexpr int V = decltype(vectors)::kValue;
    constexpr int P = pixel_block<V>();
    alignas(64) float result[P * V * kLanes];
    const float* weights = a.weights + first_vector * kLanes * depth;
    const float* bias = a.bias + first_vector * kLanes;
    float* out = a.out + y * a.out_pitch + first_vector * kLanes;
    const float* residual = a.epilogue.residual;
    if (residual != nullptr) residual += y * a.epilogue.residual_pitch + first_vector * kLanes;
    for (int64_t x = 0; x < a.width; x += P) {
      const int64_t pixels = a.width - x < P ? a.width - x : P;
      with_pixels<P>(pixels,
                     [&](auto count) { conv1x1_pixels<V, decltype(count)::kValue>(a, y, x, weights, bias, result); });
      finish(result, out + x * a.out_step, residual == nullptr ? nullptr : residual + x * a.out_step, a.out_step, V,
             static_cast<int>(pixels), a.epilogue.slope);
    }
  });
}

inline void conv1x1(const Conv1x1Args& a, int64_t y0, int64_t y1) {
  const FinishFunction finish = finish_function(a.epilogue);
  for (int64_t y = y0; y < y1; ++y) conv1x1_row(a, y, finish);
}
