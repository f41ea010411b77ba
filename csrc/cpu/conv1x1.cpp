#include "operator.h"

namespace esr {
namespace {

// 1x1 convolution of the concatenation of its inputs, which is never built, and perhaps a residual.
class Conv1x1 final : public Operator {
 public:
  Conv1x1(const Layer& layer, const Kernels& kernels, const Weights& weights) : Operator(layer, kernels) {
    const Weight& w = weight_of(layer, 0, weights, "weight", {-1, -1, 1, 1});
    cout_ = w.shape[0];
    cin_ = w.shape[1];
    weights_ = pack_conv1x1(w, kernels.lanes);
    bias_ = bias_of(layer, 1, weights, "bias", cout_, kernels.lanes);
  }

  Shape result(const std::vector<Shape>& in) const override {
    int64_t known = 0;
    bool all_known = true;
    for (size_t i = 0; i < layer_.operands(); ++i) {
      check_same_size(in[0], in[i], "x");
      all_known = all_known && in[i].channels >= 0;
      known += std::max<int64_t>(in[i].channels, 0);
    }
    STD_TORCH_CHECK(all_known ? known == cin_ : known < cin_, layer_.name(), ": the inputs have ", known,
                    " channels together, the weight takes ", cin_);
    if (layer_.has_residual) {
      check_channels(in.back(), cout_, "residual");
      check_same_size(in[0], in.back(), "residual");
    }
    return {cout_, in[0].height, in[0].width};
  }

  bool reads_tensor(size_t) const override { return true; }
  bool exports_directly() const override { return true; }

  void run(const Run& run) const override {
    const MapLayout& m = run.output.layout;
    const int64_t rows = std::max<int64_t>(1, kStripPixels / m.width);
    int64_t floats = run.output.ring == nullptr ? rows * m.pitch : 0;
    bool flat = run.output.ring == nullptr;
    for (const Map& in : run.inputs) {
      floats += in.ring == nullptr ? rows * in.layout.pitch : 0;
      flat = flat && in.ring == nullptr && one_row(in.tensor, m.width);
    }
    for (const TensorView& out : run.exports) flat = flat && one_row(out, m.width);
    parallel_ranges(m.height, m.width * m.step * cin_, [&](int64_t y0, int64_t y1) {
      const Workspace strip(floats);
      for (int64_t y = y0; y < y1; y += rows) run_rows(run, flat, strip.data(), y, std::min(y + rows, y1));
    });
  }

 private:
  // What has no map lies in a strip of it, which stays in the second-level cache.
  static constexpr int64_t kStripPixels = 384;

  // `flat`: nothing has a map, and the rows are one.
  void run_rows(const Run& run, bool flat, float* strip, int64_t y0, int64_t y1) const {
    const int64_t height = flat ? 1 : y1 - y0;
    const auto strip_of = [&](const MapLayout& whole) {
      return MapLayout::make(whole.channels, height, flat ? (y1 - y0) * whole.width : whole.width, kernels_.lanes);
    };
    const MapLayout m = strip_of(run.output.layout);
    const auto pixels_of = [&](const Map& in, const MapLayout& layout) -> const float* {
      if (in.ring != nullptr) return in.pixels() + y0 * layout.pitch;
      float* const pixels = strip;
      import_strip(kernels_, rows_from(in.tensor, y0), layout, pixels, 0, height);
      strip += height * layout.pitch;
      return pixels;
    };
    Conv1x1Args a;
    a.inputs = static_cast<int64_t>(layer_.operands());
    for (size_t i = 0; i < layer_.operands(); ++i) {
      const MapLayout layout = strip_of(run.inputs[i].layout);
      a.in[i] = pixels_of(run.inputs[i], layout);
      a.in_pitch[i] = layout.pitch;
      a.in_step[i] = layout.step;
      a.cin[i] = layout.channels;
    }
    if (layer_.has_residual) {
      a.epilogue.mode = layer_.residual_mode;
      a.epilogue.residual = pixels_of(run.inputs.back(), m);
      a.epilogue.residual_pitch = m.pitch;
    }
    a.out = run.output.ring == nullptr ? strip : run.output.pixels() + y0 * m.pitch;
    a.out_pitch = m.pitch;
    a.out_step = m.step;
    a.width = m.width;
    a.out_vectors = m.step / kernels_.lanes;
    a.weights = weights_.data();
    a.bias = bias_.data();
    a.epilogue.activation = layer_.activation;
    a.epilogue.slope = layer_.slope;
    kernels_.conv1x1(a, 0, height);
    if (run.output.ring != nullptr) zero_ring(run.output, y0, y1);
    std::vector<TensorView> exports;
    for (const TensorView& out : run.exports) exports.push_back(rows_from(out, y0));
    export_rows(kernels_, exports, m, a.out, 0, 0, height);
  }

  int64_t cout_, cin_;
  PackedFloats weights_, bias_;
};

}  // namespace

std::unique_ptr<Operator> make_conv1x1(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Conv1x1>(layer, kernels, weights);
}

}  // namespace esr
