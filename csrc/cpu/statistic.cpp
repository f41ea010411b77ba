#include <cmath>
#include <limits>

#include "operator.h"

namespace esr {
namespace {

constexpr int64_t kGroup = 16;  // channels that are combined at once

// Blocks of a row, and of all rows, in float32; their combination, always in the same order, in float64.
class StatisticOperator final : public Operator {
 public:
  using Operator::Operator;

  Shape result(const std::vector<Shape>& in) const override { return {in[0].channels, 1, 1}; }

  int64_t temporary_floats(const std::vector<Shape>& in) const override {
    const int64_t blocks = in[0].height * ceil_div(in[0].width, kStatisticPixels);
    return blocks * statistic_parts(layer_.statistic) * round_up(in[0].channels, kernels_.lanes);
  }

  void run(const Run& run) const override {
    const MapLayout& m = run.inputs[0].layout;
    StatisticArgs a;
    a.in = run.inputs[0].pixels();
    a.pitch = m.pitch;
    a.step = m.step;
    a.width = m.width;
    a.row_blocks = ceil_div(m.width, kStatisticPixels);
    a.statistic = layer_.statistic;
    a.partials = run.temporary;
    const int64_t blocks = m.height * a.row_blocks, parts = statistic_parts(layer_.statistic);
    parallel_ranges(blocks, std::min(m.width, kStatisticPixels) * m.step * parts,
                    [&](int64_t b0, int64_t b1) { kernels_.statistic_blocks(a, b0, b1); });

    float* const out = run.output.pixels();
    parallel_ranges(ceil_div(m.step, kGroup), blocks * kGroup * 4, [&](int64_t g0, int64_t g1) {
      for (int64_t c = g0 * kGroup; c < std::min(g1 * kGroup, m.step); c += kGroup) {
        const int64_t n = std::min(kGroup, m.step - c);
        std::fill_n(out + c, n, 0.0f);  // beside the channels zeros, also where a variance is NaN
        combine(a, m.height, c, std::min(n, m.channels - c), out + c);
      }
    });
    complete_rows(kernels_, run, 0, 1);
  }

 private:
  // `n` channels from c on, from the partial results of all blocks.
  void combine(const StatisticArgs& a, int64_t height, int64_t c, int64_t n, float* out) const {
    const int64_t blocks = height * a.row_blocks, stride = statistic_parts(a.statistic) * a.step;
    const double pixels = static_cast<double>(height) * static_cast<double>(a.width);
    const float* const first = a.partials + c;
    if (a.statistic == Statistic::kMaximum) {
      std::copy_n(first, n, out);
      for (int64_t b = 1; b < blocks; ++b) {
        const float* const most = first + b * stride;
        // A NaN wins.
        for (int64_t i = 0; i < n; ++i) out[i] = most[i] > out[i] || most[i] != most[i] ? most[i] : out[i];
      }
      return;
    }
    double sums[kGroup] = {}, squares[kGroup] = {};
    if (a.statistic == Statistic::kMean) {
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = 0; i < n; ++i) sums[i] += first[b * stride + i];
      }
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(sums[i] / pixels);
      return;
    }
    // Everything is shifted by the first block's mean. The variance is at least what that block alone makes of it, so
    // that the difference of the two sums keeps all but a few of float64's digits.
    for (int64_t b = 0; b < blocks; ++b) {
      const float *const mean = first + b * stride, *const rest = mean + a.step, *const square = rest + a.step;
      const int64_t left = a.width - b % a.row_blocks * kStatisticPixels;
      const double count = static_cast<double>(std::min(left, kStatisticPixels));
      for (int64_t i = 0; i < n; ++i) {
        const double shift = static_cast<double>(mean[i]) - static_cast<double>(first[i]);
        sums[i] += rest[i] + count * shift;
        squares[i] += square[i] + shift * (2.0 * rest[i] + count * shift);
      }
    }
    const double divisor = pixels - static_cast<double>(layer_.correction);
    for (int64_t i = 0; i < n; ++i) {
      const double rise = sums[i] / pixels, total = squares[i] - sums[i] * rise;
      double value = divisor > 0.0 ? (total < 0.0 ? 0.0 : total) / divisor : std::numeric_limits<double>::quiet_NaN();
      if (a.statistic != Statistic::kVariance) value = std::sqrt(value);
      if (a.statistic == Statistic::kContrast) value += static_cast<double>(first[i]) + rise;
      out[i] = static_cast<float>(value);
    }
  }
};

}  // namespace

std::unique_ptr<Operator> make_statistic(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<StatisticOperator>(layer, kernels);
}

}  // namespace esr
