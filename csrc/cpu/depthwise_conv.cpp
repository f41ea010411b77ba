#include "backward.h"
#include "capability.h"
#include "direct.h"

namespace esr {
namespace {

using torch::stable::Tensor;

// A depthwise filter and its bias, packed for the kernels.
class Filter {
 public:
  Filter(const char* name, const Weight& w, const std::vector<float>& bias, int64_t dilation, bool gated, bool planar)
      : height_(w.shape[2]),
        width_(w.shape[3]),
        dilation_(dilation),
        halves_(gated ? 2 : 1),
        channels_(w.shape[0] / halves_),
        planar_(planar) {
    STD_TORCH_CHECK(
        height_ % 2 == 1 && height_ <= kDepthwiseMostTaps && width_ % 2 == 1 && width_ <= kDepthwiseMostTaps, name,
        ": weight is ", height_, "x", width_, ", allowed are sides of 1, 3, 5 and 7");
    STD_TORCH_CHECK(dilation >= 1, name, ": dilation is ", dilation, ", must be at least 1");
    STD_TORCH_CHECK(!gated || w.shape[0] % 2 == 0, name, ": a gate needs an even number of channels");
    taps_ = pack(w.values, height_ * width_);
    bias_ = pack(bias.empty() ? std::vector<float>(static_cast<size_t>(w.shape[0])) : bias, 1);
  }

  int64_t taps() const { return height_ * width_; }
  int64_t reach() const { return height_ / 2 * dilation_; }  // rows above and below
  int64_t channels() const { return channels_; }             // of the result
  int64_t halves() const { return halves_; }
  int64_t groups() const { return planar_ ? channels_ : ceil_div(channels_, kDepthwiseGroup); }
  int64_t group_channels(int64_t k) const {
    return planar_ ? 1 : std::min(channels_ - k * kDepthwiseGroup, kDepthwiseGroup);
  }

  DepthwiseConvArgs args(const Shape& x, Activation activation, float slope) const {
    DepthwiseConvArgs a;
    a.channels = channels_;
    a.height = x.height;
    a.width = x.width;
    a.kernel_height = height_;
    a.kernel_width = width_;
    a.dilation = dilation_;
    a.weights = taps_.data();
    a.bias = bias_.data();
    a.activation = activation;
    a.slope = slope;
    a.gated = halves_ == 2;
    return a;
  }

  // `each` values of every channel: as they are, or by groups, [half][group][each][kDepthwiseGroup].
  PackedFloats pack(const std::vector<float>& values, int64_t each) const {
    if (planar_) {
      PackedFloats packed(static_cast<int64_t>(values.size()));
      std::copy(values.begin(), values.end(), packed.data());
      return packed;
    }
    const int64_t groups = ceil_div(channels_, kDepthwiseGroup);
    PackedFloats packed(halves_ * groups * each * kDepthwiseGroup);
    for (int64_t c = 0; c < halves_ * channels_; ++c) {
      const int64_t half = c / channels_, own = c % channels_;
      const int64_t group = half * groups + own / kDepthwiseGroup;
      for (int64_t t = 0; t < each; ++t) {
        packed.data()[(group * each + t) * kDepthwiseGroup + own % kDepthwiseGroup] = values[c * each + t];
      }
    }
    return packed;
  }

 private:
  int64_t height_, width_, dilation_, halves_, channels_;
  bool planar_;
  PackedFloats taps_, bias_;
};

// A layer of a plan.
class DepthwiseConv final : public Operator {
 public:
  DepthwiseConv(const Layer& layer, const Kernels& kernels, const Weights& weights)
      : Operator(layer, kernels),
        filter_(layer.name().c_str(), weight_of(layer, 0, weights, "weight", {-1, 1, -1, -1}), bias(weights),
                layer.dilation, layer.gated, false) {}

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], filter_.channels() * filter_.halves(), "x");
    return {filter_.channels(), in[0].height, in[0].width};
  }

  bool takes_rows() const override { return true; }
  bool reads_strips(size_t) const override { return true; }
  bool reads_view(size_t) const override { return true; }

  bool has_rows() const override { return true; }
  bool reads_rows(size_t) const override { return false; }
  int64_t row_cost(const Run& run) const override {
    const int64_t produced = run.producer == nullptr ? 0 : kProducerCost;
    return run.output.layout.width * run.output.layout.step * filter_.halves() * (filter_.taps() + produced);
  }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    const MapLayout& m = run.output.layout;
    DepthwiseConvArgs a = filter_.args({filter_.channels(), m.height, m.width}, layer_.activation, layer_.slope);
    const int64_t channels = filter_.channels() * filter_.halves();
    const MapLayout rows = MapLayout::make(channels, 1, m.width, kernels_.lanes);
    a.out = run.output.view();
    // Without a map, the latest rows of the producer or the tensor are kept, each with a pixel of zeros on both sides.
    const Map& in = run.inputs[0];
    const bool whole = run.producer == nullptr && in.ring != nullptr;
    a.in.column_stride = whole ? in.layout.step : rows.step;
    // With a gate, the last vector read of a pixel may end behind it.
    const int64_t line = rows.pitch + kernels_.lanes, reach = filter_.reach();
    const int64_t lines = whole ? 0 : std::min(2 * reach + 1, m.height);
    const int64_t scratch = run.producer == nullptr ? 0 : run.producer->row_floats(run.inputs);
    const Workspace memory(lines * line + scratch);
    std::fill(memory.data(), memory.data() + lines * line, 0.0f);
    const auto kept = [&](int64_t y) { return memory.data() + y % lines * line + rows.step; };
    const auto row = [&](int64_t y) -> const float* {
      if (y < 0 || y >= m.height) return nullptr;
      return whole ? in.pixels() + y * in.layout.pitch : kept(y);
    };
    int64_t next = std::max<int64_t>(y0 - reach, 0);
    for (int64_t y = y0; y < y1; ++y) {
      for (; !whole && next <= std::min(y + reach, m.height - 1); ++next) {
        if (run.producer != nullptr) {
          run.producer->compute_row(run.inputs, rows, next, kept(next), memory.data() + lines * line);
        } else {
          import_strip(kernels_, in.tensor, rows, kept(next), next, next + 1);
        }
      }
      const float* around[kDepthwiseMostTaps];
      for (int64_t k = 0; k < a.kernel_height; ++k) around[k] = row(y + (k - a.kernel_height / 2) * a.dilation);
      kernels_.depthwise_map(a, around, y);
    }
    complete_rows(kernels_, run, y0, y1);
  }

 private:
  std::vector<float> bias(const Weights& weights) const {
    if (layer_.weights[1] < 0) return {};
    const int64_t channels = weights[static_cast<size_t>(layer_.weights[0])].shape[0];
    return weight_of(layer_, 1, weights, "bias", {channels}).values;
  }

  static constexpr int64_t kProducerCost = 32;  // about, in multiply-adds of a value
  Filter filter_;
};

}  // namespace

std::unique_ptr<Operator> make_depthwise_conv(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<DepthwiseConv>(layer, kernels, weights);
}

void depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t dilation,
                    int64_t activation, double slope, bool gated, const Tensor& out) {
  constexpr const char* kName = "depthwise_conv";
  const Kernels& kernels = active_kernels();
  const std::vector<Tensor> results{out};
  Gradients t(kName, results, 1);
  const DerivativeArgs epilogue = t.epilogue(activation, slope);
  const Batch in = t.read(x, "x");
  const Weight w = t.weight(weight, "weight", {in.shape.channels, 1, -1, -1});
  const Shape shape{in.shape.channels / (gated ? 2 : 1), in.shape.height, in.shape.width};
  const Batch to = t.target(0, "the result", shape);
  if (in.images == 0) return;
  const bool planar = in.is_planar();
  STD_TORCH_CHECK(to.can_be(planar), kName, ": the result has another memory format than x");
  const Filter filter(kName, w, t.bias(bias, "bias", in.shape.channels), dilation, gated, planar);
  const DepthwiseConvArgs a = filter.args(in.shape, epilogue.activation, epilogue.slope);
  // A row of one channel, or a row of all.
  const int64_t rows = planar ? shape.channels * shape.height : shape.height;
  const int64_t cost = shape.width * (planar ? 1 : shape.channels) * filter.halves() * (filter.taps() + 4);
  const auto kernel = planar ? kernels.depthwise_planes : kernels.depthwise_pixels;
  const int64_t floats = planar ? kernels.depthwise_planes_floats(a) : kernels.depthwise_pixels_floats(a);
  parallel_ranges(in.images * rows, cost, [&](int64_t first, int64_t last) {
    const Workspace scratch(floats);
    DepthwiseConvArgs mine = a;
    mine.scratch = scratch.data();
    for_image_rows(rows, first, last, [&](int64_t n, int64_t row0, int64_t row1) {
      mine.in = in.image(n);
      mine.out = to.image(n);
      kernel(mine, row0, row1);
    });
  });
}

void depthwise_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                             const std::optional<Tensor>& bias, int64_t dilation, int64_t activation, double slope,
                             bool gated, const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "depthwise_conv_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, 3);
  const DerivativeArgs epilogue = t.epilogue(activation, slope);
  const Batch in = t.read(x, "x");
  const Weight w = t.weight(weight, "weight", {in.shape.channels, 1, -1, -1});
  const std::vector<float> b = t.bias(bias, "bias", in.shape.channels);
  const Shape shape{in.shape.channels / (gated ? 2 : 1), in.shape.height, in.shape.width};
  const Batch g = t.read(grad, "grad", shape);
  const Batch to_x = t.target(0, "the gradient to x", in.shape);
  if (!t.wants(0) && !t.wants(1) && !t.wants(2)) return;
  const bool planar = in.is_planar();
  STD_TORCH_CHECK(g.can_be(planar) && (!t.wants(0) || to_x.can_be(planar)), kName,
                  ": the gradients have another memory format than x");
  const Filter filter(kName, w, b, dilation, gated, planar);
  const int64_t taps = filter.taps(), groups = filter.groups();

  std::vector<float> reversed = w.values;
  for (auto tap = reversed.begin(); tap != reversed.end(); tap += taps) std::reverse(tap, tap + taps);
  const PackedFloats turned = filter.pack(reversed, taps), zeros(kDepthwiseGroup);
  DepthwiseConvGradientArgs a;
  a.conv = filter.args(in.shape, epilogue.activation, epilogue.slope);
  a.turned = turned.data();
  a.no_bias = zeros.data();
  a.wants_weight = t.wants(1);
  a.wants_bias = t.wants(2);
  const auto kernel = planar ? kernels.depthwise_plane_gradient : kernels.depthwise_pixels_gradient;
  const int64_t floats =
      planar ? kernels.depthwise_plane_gradient_floats(a.conv) : kernels.depthwise_pixels_gradient_floats(a.conv);

  // What one image adds to a group is summed up by one thread, and the images are added in order.
  const int64_t most = (taps + 1) * std::max(kernels.lanes, kDepthwiseGroup) * filter.halves();
  const Workspace sums(in.images * groups * most);
  const int64_t passes = (taps + 1) * filter.halves() * 4;
  parallel_ranges(in.images * groups, shape.height * shape.width * passes * filter.group_channels(0),
                  [&](int64_t first, int64_t last) {
                    const Workspace scratch(floats);
                    DepthwiseConvGradientArgs mine = a;
                    mine.conv.scratch = scratch.data();
                    for (int64_t k = first; k < last; ++k) {
                      const int64_t n = k / groups;
                      mine.conv.in = in.image(n);
                      mine.grad = g.image(n);
                      if (t.wants(0)) mine.to_x = to_x.image(n);
                      mine.sums = sums.data() + k * most;
                      kernel(mine, k % groups);
                    }
                  });
  if (epilogue.activation != Activation::kNone || gated) count_pass(Pass::kAgain);
  if (t.wants(0)) count_pass(Pass::kData);
  if (t.wants(1)) count_pass(Pass::kWeight);
  if (!t.wants(1) && !t.wants(2)) return;

  std::vector<float> to_weight(w.values.size()), to_bias(static_cast<size_t>(in.shape.channels));
  for (int64_t half = 0; half < filter.halves(); ++half) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      const int64_t group = planar ? c : c / kDepthwiseGroup;
      const int64_t step = planar ? kernels.lanes : round_up(filter.group_channels(group), kernels.lanes);
      const int64_t lane = planar ? 0 : c % kDepthwiseGroup, lanes = planar ? kernels.lanes : 1;
      for (int64_t tap = 0; tap <= taps; ++tap) {
        double sum = 0.0;
        for (int64_t n = 0; n < in.images; ++n) {
          const float* own = sums.data() + (n * groups + group) * most + (half * (taps + 1) + tap) * step + lane;
          for (int64_t i = 0; i < lanes; ++i) sum += own[i];
        }
        const int64_t channel = half * shape.channels + c;
        (tap < taps ? to_weight[channel * taps + tap] : to_bias[channel]) = static_cast<float>(sum);
      }
    }
  }
  if (t.wants(1)) t.write(1, "the gradient to weight", to_weight);
  if (t.wants(2)) t.write(2, "the gradient to bias", to_bias);
}

}  // namespace esr
