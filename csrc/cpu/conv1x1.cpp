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

  Shape result(const std::vector<Shape>& in) const override { return conv1x1_result(layer_, cout_, cin_, in); }

  bool reads_tensor(size_t) const override { return true; }
  bool reads_view(size_t k) const override { return k < layer_.operands(); }
  bool exports_directly() const override { return true; }

  bool computes_rows() const override { return true; }

  int64_t row_floats(const std::vector<Map>& inputs) const override {
    int64_t floats = 0;
    for (const Map& in : inputs) floats += in.ring == nullptr ? in.layout.pitch : 0;
    return floats;
  }

  void compute_row(const std::vector<Map>& inputs, const MapLayout& layout, int64_t y, float* row,
                   float* scratch) const override {
    const MapLayout m = MapLayout::make(layout.channels, 1, layout.width, kernels_.lanes);
    compute(inputs, m, false, scratch, y, y + 1, row);
  }

  bool has_rows() const override { return true; }
  int64_t row_cost(const Run& run) const override { return run.output.layout.width * run.output.layout.step * cin_; }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    const MapLayout& m = run.output.layout;
    const int64_t rows = std::max<int64_t>(1, kStripPixels / m.width);
    int64_t floats = run.output.ring == nullptr ? rows * m.pitch : 0;
    bool flat = run.output.ring == nullptr;
    for (const Map& in : run.inputs) {
      floats += in.ring == nullptr ? rows * in.layout.pitch : 0;
      flat = flat && in.ring == nullptr && one_row(in.tensor, m.width);
    }
    for (const TensorView& out : run.exports) flat = flat && one_row(out, m.width);
    const Workspace strip(floats);
    for (int64_t y = y0; y < y1; y += rows) run_strip(run, flat, strip.data(), y, std::min(y + rows, y1));
  }

 private:
  // What has no map lies in a strip of it, which stays in the second-level cache.
  static constexpr int64_t kStripPixels = 384;

  // A strip of a map; `flat`: its rows as one.
  MapLayout strip_of(const MapLayout& whole, bool flat, int64_t rows) const {
    return MapLayout::make(whole.channels, flat ? 1 : rows, flat ? rows * whole.width : whole.width, kernels_.lanes);
  }

  // `flat`: nothing has a map, and the rows are one.
  void run_strip(const Run& run, bool flat, float* strip, int64_t y0, int64_t y1) const {
    const MapLayout m = strip_of(run.output.layout, flat, y1 - y0);
    float* const out = run.output.ring == nullptr ? strip : run.output.pixels() + y0 * m.pitch;
    compute(run.inputs, m, flat, run.output.ring == nullptr ? strip + m.height * m.pitch : strip, y0, y1, out);
    if (run.output.ring != nullptr) zero_ring(run.output, y0, y1);
    std::vector<TensorView> exports;
    for (const TensorView& to : run.exports) exports.push_back(rows_from(to, y0));
    export_rows(kernels_, exports, m, out, 0, 0, m.height);
  }

  // Rows [y0, y1) of the result, which is a strip of layout `m`; inputs without a map are brought to `strip`.
  void compute(const std::vector<Map>& inputs, const MapLayout& m, bool flat, float* strip, int64_t y0, int64_t y1,
               float* out) const {
    const auto pixels_of = [&](const Map& in, const MapLayout& layout) -> const float* {
      if (in.ring != nullptr) return in.pixels() + y0 * in.layout.pitch;
      float* const pixels = strip;
      import_strip(kernels_, rows_from(in.tensor, y0), layout, pixels, 0, m.height);
      strip += m.height * layout.pitch;
      return pixels;
    };
    Conv1x1Args a;
    a.inputs = static_cast<int64_t>(layer_.operands());
    for (size_t i = 0; i < layer_.operands(); ++i) {
      const Map& in = inputs[i];
      const MapLayout layout = in.ring != nullptr ? in.layout : strip_of(in.layout, flat, y1 - y0);
      a.in[i] = pixels_of(in, layout);
      a.in_pitch[i] = layout.pitch;
      a.in_step[i] = layout.step;
      a.cin[i] = layout.channels;
    }
    if (layer_.has_residual) {
      a.epilogue.mode = layer_.residual_mode;
      a.epilogue.residual = pixels_of(inputs.back(), m);
      a.epilogue.residual_pitch = m.pitch;
    }
    a.out = out;
    a.out_pitch = m.pitch;
    a.out_step = m.step;
    a.width = m.width;
    a.out_vectors = m.step / kernels_.lanes;
    a.weights = weights_.data();
    a.bias = bias_.data();
    a.epilogue.activation = layer_.activation;
    a.epilogue.slope = layer_.slope;
    kernels_.conv1x1(a, 0, m.height);
  }

  int64_t cout_, cin_;
  PackedFloats weights_, bias_;
};

}  // namespace

Shape conv1x1_result(const Layer& layer, int64_t cout, int64_t cin, const std::vector<Shape>& in) {
  int64_t known = 0;
  bool all_known = true;
  for (size_t i = 0; i < layer.operands(); ++i) {
    check_same_size(layer, in[0], in[i], "x");
    all_known = all_known && in[i].channels >= 0;
    known += std::max<int64_t>(in[i].channels, 0);
  }
  STD_TORCH_CHECK(all_known ? known == cin : known < cin, layer.name(), ": the inputs have ", known,
                  " channels together, the weight takes ", cin);
  if (layer.has_residual) {
    check_channels(layer, in.back(), cout, "residual");
    check_same_size(layer, in[0], in.back(), "residual");
  }
  return {cout, in[0].height, in[0].width};
}

std::unique_ptr<Operator> make_conv1x1(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Conv1x1>(layer, kernels, weights);
}

}  // namespace esr
