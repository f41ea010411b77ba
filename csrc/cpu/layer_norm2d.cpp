#include "backward.h"
#include "capability.h"
#include "direct.h"

namespace esr {
namespace {

using torch::stable::Tensor;

// The pixels of images of one memory format as rows, each cut into runs for the kernels. Planes without gaps between
// their rows are one long row.
struct Runs {
  bool planar = true;
  int64_t height = 0, width = 0, length = 0;

  Runs(const char* name, const std::vector<Batch>& tensors)
      : planar(tensors[0].is_planar()), height(tensors[0].shape.height), width(tensors[0].shape.width) {
    bool dense = true;
    for (const Batch& b : tensors) {
      dense = dense && (b.shape.height == 1 || b.first.row_stride == width * b.first.column_stride);
      STD_TORCH_CHECK(b.can_be(planar), name, ": the tensors of a call must have one memory format");
    }
    if (dense) {
      width *= height;
      height = 1;
    }
    length = std::min(width, kNormPixels);
  }
  int64_t per_row() const { return ceil_div(width, length); }
  int64_t count() const { return height * per_row(); }  // of an image

  // f(y, x, n) for runs [first, last) of an image.
  template <typename F>
  void visit(int64_t first, int64_t last, const F& f) const {
    for (int64_t k = first; k < last; ++k) {
      const int64_t y = k / per_row(), x = k % per_row() * length;
      f(y, x, std::min(length, width - x));
    }
  }
};

std::vector<float> ones_or(const Gradients& t, const std::optional<Tensor>& weight, int64_t channels) {
  std::vector<float> w = t.bias(weight, "weight", channels);
  if (w.empty()) w.assign(static_cast<size_t>(channels), 1.0f);
  return w;
}

// A layer of a plan.
class LayerNorm2d final : public Operator {
 public:
  LayerNorm2d(const Layer& layer, const Kernels& kernels, const Weights& weights)
      : Operator(layer, kernels), bias_(bias_of(layer, 1, weights, "bias", layer.channels, kernels.lanes)) {
    const std::vector<float> ones(static_cast<size_t>(layer.channels), 1.0f);
    weight_ = layer.weights[0] < 0 ? pack_vector(ones.data(), layer.channels, kernels.lanes)
                                   : bias_of(layer, 0, weights, "weight", layer.channels, kernels.lanes);
  }

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], layer_.channels, "x");
    return {layer_.channels, in[0].height, in[0].width};
  }

  bool reads_tensor(size_t) const override { return true; }
  bool overwrites(size_t) const override { return true; }

  bool has_rows() const override { return true; }
  int64_t row_cost(const Run& run) const override { return run.output.layout.width * run.output.layout.step * 8; }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    const MapLayout& m = run.output.layout;
    const Map& in = run.inputs[0];
    LayerNormArgs a;
    a.channels = layer_.channels;
    a.weight = weight_.data();
    a.bias = bias_.data();
    a.eps = layer_.epsilon;
    a.out = run.output.view();
    // A tensor is brought into the result's map and normalised there.
    a.in = in.ring == nullptr ? a.out : in.view();
    for (int64_t y = y0; y < y1; ++y) {
      if (in.ring == nullptr) import_strip(kernels_, in.tensor, m, run.output.pixels() + y * m.pitch, y, y + 1);
      kernels_.norm_pixels(a, y, 0, m.width);
    }
    complete_rows(kernels_, run, y0, y1);
  }

 private:
  PackedFloats weight_, bias_;
};

}  // namespace

std::unique_ptr<Operator> make_layer_norm2d(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<LayerNorm2d>(layer, kernels, weights);
}

void layer_norm2d(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                  const Tensor& out) {
  constexpr const char* kName = "layer_norm2d";
  const Kernels& kernels = active_kernels();
  const std::vector<Tensor> results{out};
  Gradients t(kName, results, 1);
  const Batch in = t.read(x, "x");
  const Shape shape = in.shape;
  const Batch to = t.target(0, "the result", shape);
  const std::vector<float> w = ones_or(t, weight, shape.channels), b = t.bias(bias, "bias", shape.channels);
  if (in.images == 0) return;
  const PackedFloats packed_weight = pack_vector(w.data(), shape.channels, kernels.lanes),
                     packed_bias = pack_vector(data_or_null(b), shape.channels, kernels.lanes);
  LayerNormArgs a;
  a.channels = shape.channels;
  a.weight = packed_weight.data();
  a.bias = packed_bias.data();
  a.eps = static_cast<float>(eps);
  const Runs runs(kName, {to, in});
  const auto kernel = runs.planar ? kernels.norm_planes : kernels.norm_pixels;
  parallel_ranges(in.images * runs.count(), runs.length * shape.channels * 8, [&](int64_t first, int64_t last) {
    const Workspace scratch(shape.channels * kNormPixels);
    LayerNormArgs mine = a;
    mine.scratch = scratch.data();
    while (first < last) {
      const int64_t n = first / runs.count(), start = n * runs.count(), end = std::min(last, start + runs.count());
      mine.in = in.image(n);
      mine.out = to.image(n);
      runs.visit(first - start, end - start, [&](int64_t y, int64_t x, int64_t n) { kernel(mine, y, x, n); });
      first = end;
    }
  });
}

void layer_norm2d_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps,
                           const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "layer_norm2d_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, 3);
  const Batch in = t.read(x, "x");
  const Shape shape = in.shape;
  const Batch g = t.read(grad, "grad", shape);
  const Batch to_x = t.target(0, "the gradient to x", shape);
  const std::vector<float> w = ones_or(t, weight, shape.channels);
  if (!t.wants(0) && !t.wants(1) && !t.wants(2)) return;
  const PackedFloats packed_weight = pack_vector(w.data(), shape.channels, kernels.lanes);
  LayerNormGradientArgs a;
  a.norm.channels = shape.channels;
  a.norm.weight = packed_weight.data();
  a.norm.eps = static_cast<float>(eps);
  std::vector<Batch> tensors{in, g};
  if (t.wants(0)) tensors.push_back(to_x);
  const Runs runs(kName, tensors);
  const auto kernel = runs.planar ? kernels.norm_planes_gradient : kernels.norm_pixels_gradient;

  // Sums over parts of an image, cut by its size alone, each summed up by one thread; they are added in order.
  constexpr int64_t kRuns = 32;
  const int64_t parts = ceil_div(runs.count(), kRuns), lanes = runs.planar ? kernels.lanes : 1;
  const int64_t step = runs.planar ? shape.channels * lanes : round_up(shape.channels, kernels.lanes);
  const Workspace sums(in.images * parts * 2 * step);
  parallel_ranges(in.images * parts, kRuns * runs.length * shape.channels * 16, [&](int64_t first, int64_t last) {
    const Workspace scratch(2 * shape.channels * kNormPixels);
    LayerNormGradientArgs mine = a;
    mine.norm.scratch = scratch.data();
    for (int64_t k = first; k < last; ++k) {
      const int64_t n = k / parts, part = k % parts;
      mine.norm.in = in.image(n);
      mine.grad = g.image(n);
      if (t.wants(0)) mine.to_x = to_x.image(n);
      mine.sums = sums.data() + k * 2 * step;
      std::fill(mine.sums, mine.sums + 2 * step, 0.0f);
      runs.visit(part * kRuns, std::min((part + 1) * kRuns, runs.count()),
                 [&](int64_t y, int64_t x, int64_t n) { kernel(mine, y, x, n); });
    }
  });
  for (int64_t k = 0; k < 2; ++k) {
    if (!t.wants(static_cast<size_t>(k + 1))) continue;
    std::vector<float> total(static_cast<size_t>(shape.channels));
    for (int64_t c = 0; c < shape.channels; ++c) {
      double sum = 0.0;
      for (int64_t part = 0; part < in.images * parts; ++part) {
        const float* own = sums.data() + (part * 2 + k) * step + c * lanes;
        for (int64_t i = 0; i < lanes; ++i) sum += own[i];
      }
      total[c] = static_cast<float>(sum);
    }
    t.write(static_cast<size_t>(k + 1), k == 0 ? "the gradient to weight" : "the gradient to bias", total);
  }
}

}  // namespace esr
