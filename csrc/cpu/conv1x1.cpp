#include "operator.h"

namespace esr {
namespace {

// 1x1 convolution of the concatenation of its inputs, which is never built.
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
    for (const Shape& s : in) {
      check_same_size(in[0], s, "x");
      all_known = all_known && s.channels >= 0;
      known += std::max<int64_t>(s.channels, 0);
    }
    STD_TORCH_CHECK(all_known ? known == cin_ : known < cin_, layer_.name(), ": the inputs have ", known,
                    " channels together, the weight takes ", cin_);
    return {cout_, in[0].height, in[0].width};
  }

  void run(const Run& run) const override {
    const MapLayout& m = run.output.layout;
    Conv1x1Args a;
    a.inputs = static_cast<int64_t>(run.inputs.size());
    for (size_t i = 0; i < run.inputs.size(); ++i) {
      const Map& in = run.inputs[i];
      a.in[i] = in.pixels();
      a.in_pitch[i] = in.layout.pitch;
      a.in_step[i] = in.layout.step;
      a.cin[i] = in.layout.channels;
    }
    a.out = run.output.pixels();
    a.out_pitch = m.pitch;
    a.out_step = m.step;
    a.width = m.width;
    a.out_vectors = m.step / kernels_.lanes;
    a.weights = weights_.data();
    a.bias = bias_.data();
    a.epilogue.activation = layer_.activation;
    a.epilogue.slope = layer_.slope;
    parallel_ranges(m.height, m.width * m.step * cin_, [&](int64_t y0, int64_t y1) {
      kernels_.conv1x1(a, y0, y1);
      complete_rows(kernels_, run, y0, y1);
    });
  }

 private:
  int64_t cout_, cin_;
  PackedFloats weights_, bias_;
};

}  // namespace

std::unique_ptr<Operator> make_conv1x1(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Conv1x1>(layer, kernels, weights);
}

}  // namespace esr
