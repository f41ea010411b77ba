#include <cstring>

#include "operator.h"

namespace esr {
namespace {

// 1x1 convolution, then a depthwise 3x3 one over its padded result, and perhaps a residual. The intermediate is never
// whole: each thread keeps the three rows it needs.
class Bsconv final : public Operator {
 public:
  Bsconv(const Layer& layer, const Kernels& kernels, const Weights& weights) : Operator(layer, kernels) {
    const Weight& pointwise = weight_of(layer, 0, weights, "pointwise", {-1, -1, 1, 1});
    cout_ = pointwise.shape[0];
    cin_ = pointwise.shape[1];
    pointwise_ = pack_conv1x1(pointwise, kernels.lanes);
    depthwise_ = pack_depthwise(weight_of(layer, 1, weights, "depthwise", {cout_, 1, 3, 3}), kernels.lanes);
    bias_ = bias_of(layer, 2, weights, "bias", cout_, kernels.lanes);
    no_bias_ = pack_vector(nullptr, cout_, kernels.lanes);
  }

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], cin_, "x");
    // 0x0 stands for "not known yet".
    const bool known = in[0].height > 0 && in[0].width > 0;
    STD_TORCH_CHECK(!layer_.reflect || !known || (in[0].height >= 2 && in[0].width >= 2), layer_.name(), ": x is ",
                    in[0].height, "x", in[0].width, ", reflect padding needs 2 pixels a side");
    if (layer_.has_residual) {
      check_channels(in[1], cout_, "residual");
      check_same_size(in[0], in[1], "residual");
    }
    return {cout_, in[0].height, in[0].width};
  }

  void run(const Run& run) const override {
    const MapLayout& m = run.output.layout;
    const Map& in = run.inputs[0];
    parallel_ranges(m.height, m.width * m.step * (cin_ + 9), [&](int64_t y0, int64_t y1) {
      // Row y of the intermediate is in line (y + 3) % 3; the fourth line is the row of zeros outside.
      const Workspace lines(4 * m.pitch);
      const auto line = [&](int64_t y) { return lines.data() + (y + 3) % 3 * m.pitch; };
      float* outside = lines.data() + 3 * m.pitch;
      std::memset(outside, 0, static_cast<size_t>(m.pitch) * sizeof(float));
      const auto padded = [&](int64_t y) {
        if (y >= 0 && y < m.height) return line(y);
        return layer_.reflect ? line(y < 0 ? 1 : m.height - 2) : outside;
      };
      for (int64_t y = std::max<int64_t>(y0 - 1, 0); y < std::min(y0 + 1, m.height); ++y) {
        pointwise_row(in, m, y, line(y));
      }
      for (int64_t y = y0; y < y1; ++y) {
        if (y + 1 < m.height) pointwise_row(in, m, y + 1, line(y + 1));
        DepthwiseArgs a;
        for (int64_t k = 0; k < 3; ++k) a.rows[k] = padded(y - 1 + k);
        a.step = m.step;
        a.width = m.width;
        a.weights = depthwise_.data();
        a.bias = bias_.data();
        a.out = run.output.pixels() + y * m.pitch;
        a.epilogue.activation = layer_.activation;
        a.epilogue.slope = layer_.slope;
        if (layer_.has_residual) {
          a.epilogue.mode = layer_.residual_mode;
          a.epilogue.residual = run.inputs[1].pixels();
          a.epilogue.residual_pitch = m.pitch;
        }
        kernels_.depthwise(a, y);
      }
      complete_rows(kernels_, run, y0, y1);
    });
  }

 private:
  void pointwise_row(const Map& in, const MapLayout& m, int64_t y, float* line) const {
    Conv1x1Args a;
    a.inputs = 1;
    a.in[0] = in.pixels() + y * in.layout.pitch;
    a.in_step[0] = in.layout.step;
    a.cin[0] = cin_;
    a.out = line + m.step;
    a.out_step = m.step;
    a.width = m.width;
    a.out_vectors = m.step / kernels_.lanes;
    a.weights = pointwise_.data();
    a.bias = no_bias_.data();
    kernels_.conv1x1(a, 0, 1);
    const size_t pixel = static_cast<size_t>(m.step) * sizeof(float);
    float* right = line + (m.width + 1) * m.step;
    if (layer_.reflect) {
      std::memcpy(line, line + 2 * m.step, pixel);
      std::memcpy(right, right - 2 * m.step, pixel);
    } else {
      std::memset(line, 0, pixel);
      std::memset(right, 0, pixel);
    }
  }

  int64_t cout_, cin_;
  PackedFloats pointwise_, depthwise_, bias_, no_bias_;
};

}  // namespace

std::unique_ptr<Operator> make_bsconv(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Bsconv>(layer, kernels, weights);
}

}  // namespace esr
