// What statistics need of blocks of a map's pixels. Included after adaptive_max_pool.h in every path_*.cpp.

// f(sum, pixel) for `pixels` pixels of one vector of channels, and the four sums it leaves as one. Four, so that a sum
// does not wait for the one before it; which pixel goes to which depends on nothing but the block.
template <typename F, typename G>
ESR_INLINE Vec over_pixels(const float* x, int64_t step, int64_t pixels, Vec start, const F& f, const G& combine) {
  Vec sums[4] = {start, start, start, start};
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) {
    ESR_UNROLL for (int k = 0; k < 4; ++k) sums[k] = f(sums[k], load(x + (p + k) * step));
  }
  for (; p < pixels; ++p) sums[0] = f(sums[0], load(x + p * step));
  return combine(combine(sums[0], sums[1]), combine(sums[2], sums[3]));
}

ESR_INLINE Vec sum_pixels(const float* x, int64_t step, int64_t pixels) {
  const auto sum = [](Vec a, Vec b) { return add(a, b); };
  return over_pixels(x, step, pixels, zero(), sum, sum);
}

// Blocks [b0, b1), counted through the rows.
inline void statistic_blocks(const StatisticArgs& a, int64_t b0, int64_t b1) {
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t y = b / a.row_blocks, x = b % a.row_blocks * kStatisticPixels;
    const int64_t pixels = a.width - x < kStatisticPixels ? a.width - x : kStatisticPixels;
    const float* const block = a.in + y * a.pitch + x * a.step;
    float* const out = a.partials + b * statistic_parts(a.statistic) * a.step;
    for (int64_t c = 0; c < a.step; c += kLanes) {
      const float* const in = block + c;
      if (a.statistic == Statistic::kMaximum) {
        const auto most = [](Vec m, Vec v) { return larger(v, m); };
        store(out + c, over_pixels(in, a.step, pixels, load(in), most, most));
        continue;
      }
      const Vec sum = sum_pixels(in, a.step, pixels);
      if (a.statistic == Statistic::kMean) {
        store(out + c, sum);
        continue;
      }
      // Deviations from a number near the mean: its own rounding is in their sum.
      const Vec mean = div(sum, set1(static_cast<float>(pixels)));
      Vec rest = zero(), squares = zero();
      Vec more_rest = zero(), more_squares = zero();
      for (int64_t p = 0; p < pixels; p += 2) {
        const Vec d = sub(load(in + p * a.step), mean);
        rest = add(rest, d);
        squares = fma(d, d, squares);
        if (p + 1 < pixels) {
          const Vec e = sub(load(in + (p + 1) * a.step), mean);
          more_rest = add(more_rest, e);
          more_squares = fma(e, e, more_squares);
        }
      }
      store(out + c, mean);
      store(out + a.step + c, add(rest, more_rest));
      store(out + 2 * a.step + c, add(squares, more_squares));
    }
  }
}
