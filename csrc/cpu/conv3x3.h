// Direct 3x3 convolution. Included after multiply.h in every path_*.cpp.

template <int V, int P>
void conv3x3_pixels(const Conv3x3Args& a, const float* in, const float* weights, const float* bias, float* result) {
  Accumulators<V, P> acc;
  acc.start(bias);
  const int64_t tap = a.cin * V * kLanes;
  for (int ky = 0; ky < 3; ++ky) {
    for (int kx = 0; kx < 3; ++kx) {
      acc.multiply(in + ky * a.in_pitch + kx * a.in_step, a.in_pixel_step, a.cin, weights + (ky * 3 + kx) * tap);
    }
  }
  acc.write(result, V * kLanes);
}

template <int V>
void conv3x3_block_row(const Conv3x3Args& a, int64_t y, int64_t first_vector, FinishFunction finish) {
  constexpr int P = pixel_block<V>();
  alignas(64) float result[P * V * kLanes];
  const float* weights = a.weights + first_vector * kLanes * 9 * a.cin;
  const float* bias = a.bias + first_vector * kLanes;
  const float* in = a.in + y * a.in_row_step;
  float* out = a.out + (y - a.out_first_row) * a.out_pitch + first_vector * kLanes;
  const float* residual = a.epilogue.residual;
  if (residual != nullptr) residual += y * a.epilogue.residual_pitch + first_vector * kLanes;
  for (int64_t x = 0; x < a.width; x += P) {
    const int64_t pixels = a.width - x < P ? a.width - x : P;
    with_pixels<P>(pixels, [&](auto count) {
      conv3x3_pixels<V, decltype(count)::kValue>(a, in + x * a.in_pixel_step, weights, bias, result);
    });
    finish(result, out + x * a.out_step, residual == nullptr ? nullptr : residual + x * a.out_step, a.out_step, V,
           static_cast<int>(pixels), a.epilogue.slope);
  }
}

inline void conv3x3(const Conv3x3Args& a, int64_t y0, int64_t y1) {
  const FinishFunction finish = finish_function(a.epilogue);
  // A few rows at a time for all output channels: the input rows stay in the second-level cache meanwhile, and a
  // block's weights in the first-level one during a row.
  const int64_t row_bytes = a.width * a.in_step * static_cast<int64_t>(sizeof(float));
  int64_t strip = (int64_t{128} << 10) / (row_bytes + 1);
  strip = strip < 1 ? 1 : (strip > 8 ? 8 : strip);
  for (int64_t y = y0; y < y1; y += strip) {
    const int64_t end = y + strip < y1 ? y + strip : y1;
    for_blocks(a.out_vectors, [&](auto count, int64_t first_vector) {
      for (int64_t row = y; row < end; ++row) {
        conv3x3_block_row<decltype(count)::kValue>(a, row, first_vector, finish);
      }
    });
  }
}
