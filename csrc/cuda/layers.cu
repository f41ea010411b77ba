// The layers that are one launch: convolutions, and what happens pixel by pixel or channel by channel.
#include <algorithm>

#include "adaptive_max_pool.h"
#include "chain.h"
#include "depthwise.h"
#include "enlarge.h"
#include "layer_norm.h"
#include "modulate.h"
#include "pointwise.h"
#include "spab.h"
#include "statistic.h"
#include "step.h"
#include "switches.h"
#include "weight_copy.h"
#include "wgmma.h"
#include "winograd.h"

namespace esr::cuda {
namespace {

// conv3x3, conv3x3_pixel_shuffle, bsconv and conv1x1.
//
// A bsconv is a 3x3 convolution with the product of its two weights, exactly for both paddings: its 1x1 part has no
// bias, so that zeros around the input are zeros around its result.
class ConvolutionStep : public Step {
 public:
  ConvolutionStep(const Layer& layer, Precision precision, const Weights& weights, const Shapes& inputs, bool network)
      : Step(layer, precision), separable_(layer.op == Op::kBsconv) {
    for (size_t i = 0; i < layer.operands(); ++i) channels_.push_back(static_cast<int32_t>(inputs[i].channels));
    int64_t in_channels = 0;
    for (const int32_t c : channels_) in_channels += c;
    taps_ = layer.op == Op::kConv1x1 ? 1 : 9;
    const int64_t size = taps_ == 1 || separable_ ? 1 : 3;
    const WeightView w = weight_of(0, weights, separable_ ? "pointwise" : "weight", {-1, in_channels, size, size});
    out_channels_ = w.sizes[0];
    if (separable_) weight_of(1, weights, "depthwise", {out_channels_, 1, 3, 3});
    weight_of(bias_index(), weights, "bias", {out_channels_});
    const int64_t square = layer.upscale_factor * layer.upscale_factor;
    STD_TORCH_CHECK(out_channels_ % square == 0, layer.name(), ": weight has ", out_channels_,
                    " output channels, must be a multiple of ", square);
    if (gathers()) {
      // One map with every input in units of its own: the same products in the same order.
      int32_t units = 0;
      for (const int32_t c : channels_) units += units_of(c);
      const auto all = static_cast<int32_t>(units * unit_channels(precision));
      packing_ = plan_packing(precision, taps_, &all, 1, static_cast<int32_t>(out_channels_), 1);
    } else {
      packing_ = plan_packing(precision, taps_, channels_.data(), static_cast<int32_t>(channels_.size()),
                              static_cast<int32_t>(out_channels_), 1);
    }
    // A network's convolutions only: a single one's float16 results are up to twice further off than is allowed.
    transforms_ = network && switched_on(kWinogradSwitch) && taps_ == 9 && !separable_ &&
                  plan_winograd(precision, channels_[0], static_cast<int32_t>(out_channels_), &winograd_packing_);
    by_warpgroups_ = !transforms_ && switched_on(kWgmmaSwitch) && taps_ == 9 &&
                     plan_wgmma(precision, channels_[0], static_cast<int32_t>(out_channels_), &wgmma_packing_);
  }

  Shape result(const Shapes& inputs) const override {
    for (size_t i = 0; i < channels_.size(); ++i) {
      check_channels(inputs[i], channels_[i], "an input");
      check_same_size(inputs[0], inputs[i], "an input");
    }
    const int64_t r = layer_.upscale_factor;
    const Shape out{out_channels_ / (r * r), inputs[0].height * r, inputs[0].width * r};
    if (layer_.has_residual) {
      check_channels(inputs.back(), out.channels, "residual");
      check_same_size(out, inputs.back(), "residual");
    }
    if (layer_.reflect && out.height > 0 && out.width > 0) {
      STD_TORCH_CHECK(out.height > 1 && out.width > 1, layer_.name(), ": reflect padding needs 2 pixels a side, x is ",
                      out.height, "x", out.width);
    }
    return out;
  }

  bool take_over(const Step& next) override {
    if (layer_.op != Op::kConv3x3 || next.layer().op != Op::kConv1x1 || next.layer().inputs.size() != 1) return false;
    if (transforms_) return false;
    const auto& tail = static_cast<const ConvolutionStep&>(next);
    if (!plan_tail(packing_, static_cast<int32_t>(tail.out_channels_), &tail_packing_)) return false;
    if (by_warpgroups_ && !fits_wgmma_tail(wgmma_packing_, tail_packing_)) return false;
    tail_ = &tail;
    return true;
  }

  bool starts_block(const Step& second, const Step& third) const override {
    const auto convolves = [](const Step& s, Activation activation, bool residual) {
      const Layer& l = s.layer();
      return l.op == Op::kConv3x3 && l.activation == activation && l.has_residual == residual;
    };
    const bool fits = convolves(*this, Activation::kSilu, false) && convolves(second, Activation::kSilu, false) &&
                      convolves(third, Activation::kNone, true) &&
                      third.layer().residual_mode == ResidualMode::kAttention;
    if (!fits) return false;
    const auto& b = static_cast<const ConvolutionStep&>(second);
    const auto& c = static_cast<const ConvolutionStep&>(third);
    if (!usual() || !b.usual() || !c.usual()) return false;
    return c.out_channels_ == channels_[0] && plan_spab(packing_, b.packing_, c.packing_);
  }

  void run_block(const Block& block) const override {
    Spab spab;
    SpabArgs& a = spab.args;
    a.packing = packing_;
    for (size_t k = 0; k < 3; ++k) {
      a.weights[k] = block.packed[k];
      a.bias[k] = reinterpret_cast<const float*>(block.packed[k] + packing_.weight_bytes());
    }
    a.middle = block.middle;
    a.middle_channels = static_cast<int32_t>(out_channels_);
    a.last.inputs[0] = block.input.view;
    a.last.output = block.output.view;
    a.last.out_channels = channels_[0];
    a.last.height = static_cast<int32_t>(block.input.shape.height);
    a.last.width = static_cast<int32_t>(block.input.shape.width);
    prepare_spab(spab, block.batch);
    launch_spab(spab, block.stream, block.overlap);
  }

  std::vector<ChainStage> chain_stages() const override {
    const bool plain = layer_.op == Op::kConv3x3 || layer_.op == Op::kConv1x1 || separable_;
    if (!plain || layer_.reflect || !usual() || gathers() || !chainable(packing_)) return {};
    std::vector<ChainStage> stages = {{packing_, 0, layer_.activation, layer_.slope, residual_mode()}};
    if (tail_ != nullptr) {
      if (!chainable(tail_packing_) || !chain_together(packing_, tail_packing_)) return {};
      stages.push_back({tail_packing_, tail_at(), tail_->layer_.activation, tail_->layer_.slope, ResidualMode::kNone});
    }
    return stages;
  }

  int64_t packed_bytes() const override { return tail_ == nullptr ? own_bytes() : tail_at() + tail_packing_.bytes(); }

  void pack(const Weights& weights, unsigned char* packed, device::Stream stream) const override {
    if (transforms_) {
      launch_winograd_pack({pack_args(packing_, weights, packed), winograd_packing_}, stream);
    } else if (by_warpgroups_) {
      launch_wgmma_pack({pack_args(packing_, weights, packed), wgmma_packing_}, stream);
    } else {
      pack_as(packing_, weights, packed, stream);
    }
    if (tail_ != nullptr) tail_->pack_as(tail_packing_, weights, packed + tail_at(), stream);
  }

  std::string way() const override { return transforms_ ? "Winograd" : by_warpgroups_ ? "wgmma" : ""; }

  int64_t temporary_bytes(const Shapes& inputs, int64_t batch) const override {
    return gathers() ? blocked_bytes(precision_, gathered_shape(inputs), batch) : 0;
  }

  void run(const Run& run) const override {
    Convolution c;
    Winograd winograd;
    Wgmma wgmma;
    c.packing = packing_;
    ConvolutionArgs& a = transforms_ ? winograd.args.convolution : by_warpgroups_ ? wgmma.args.convolution : c.args;
    const Shape& in = run.inputs[0].shape;
    bool overlap = run.overlap;
    if (gathers()) {
      a.inputs[0] = gather(run, overlap);
      overlap = true;
    } else {
      for (size_t i = 0; i < channels_.size(); ++i) a.inputs[i] = run.inputs[i].view;
    }
    a.shift = run.inputs[0].shift;
    a.scale = run.inputs[0].scale;
    a.output = run.output.view;
    if (layer_.has_residual) a.residual = run.inputs.back().view;
    a.weights = run.packed;
    const int64_t weight_bytes = transforms_      ? winograd_packing_.weight_bytes()
                                 : by_warpgroups_ ? wgmma_packing_.weight_bytes()
                                                  : packing_.weight_bytes();
    a.bias = reinterpret_cast<const float*>(run.packed + weight_bytes);
    a.stride = 1;
    a.padding = taps_ == 9 ? 1 : 0;
    a.reflect = layer_.reflect;
    a.height = a.out_height = static_cast<int32_t>(in.height);
    a.width = a.out_width = static_cast<int32_t>(in.width);
    a.shuffle = static_cast<int32_t>(layer_.upscale_factor);
    a.activation = layer_.activation;
    a.slope = layer_.slope;
    a.residual_mode = residual_mode();
    if (transforms_) {
      winograd.precision = precision_;
      winograd.args.packing = winograd_packing_;
      prepare_winograd(winograd, run.batch);
      return launch_winograd(winograd, run.stream, overlap);
    }
    if (tail_ != nullptr) {
      c.tail = wgmma.tail = tail_packing_;
      a.tail_weights = run.packed + tail_at();
      a.tail_bias = reinterpret_cast<const float*>(a.tail_weights + tail_packing_.weight_bytes());
      a.tail_activation = tail_->layer_.activation;
      a.tail_slope = tail_->layer_.slope;
    }
    if (by_warpgroups_) {
      wgmma.args.packing = wgmma_packing_;
      prepare_wgmma(wgmma, run.batch);
      return launch_wgmma(wgmma, run.stream, overlap);
    }
    c.half_sums = switched_on(kHalfSumsSwitch);
    prepare_convolution(c, run.batch);
    launch_convolution(c, run.stream, overlap);
  }

 private:
  void pack_as(const Packing& packing, const Weights& weights, unsigned char* packed, device::Stream stream) const {
    launch_pack(pack_args(packing, weights, packed), stream);
  }

  PackArgs pack_args(const Packing& packing, const Weights& weights, unsigned char* packed) const {
    PackArgs a = {};
    a.packing = packing;
    a.maps = static_cast<int32_t>(channels_.size());
    for (size_t i = 0; i < channels_.size(); ++i) a.channels[i] = channels_[i];
    const auto weight = [&](size_t k) {
      return layer_.weights[k] < 0 ? WeightView{} : weights[static_cast<size_t>(layer_.weights[k])];
    };
    a.weight = weight(separable_ ? 1 : 0);
    if (separable_) a.inner = weight(0);
    a.bias = weight(bias_index());
    a.composition = separable_ ? Composition::kDepthwise : Composition::kPlain;
    a.out = packed;
    return a;
  }

  bool usual() const { return !transforms_ && !by_warpgroups_; }
  int64_t own_bytes() const {
    if (transforms_) return winograd_packing_.bytes();
    return by_warpgroups_ ? wgmma_packing_.bytes() : packing_.bytes();
  }
  // A pixel shuffle's residual has no mode: it is added.
  ResidualMode residual_mode() const {
    return layer_.has_residual && layer_.residual_mode == ResidualMode::kNone ? ResidualMode::kPost
                                                                              : layer_.residual_mode;
  }

  int64_t tail_at() const { return round_up(own_bytes(), kAlignment); }
  size_t bias_index() const { return separable_ ? 2 : 1; }
  // More maps than one launch reads are copied into one.
  bool gathers() const { return channels_.size() > kMostInputs; }
  int32_t units_of(int32_t channels) const {
    return static_cast<int32_t>(ceil_div(channels, unit_channels(precision_)));
  }

  Shape gathered_shape(const Shapes& inputs) const {
    int64_t units = 0;
    for (const int32_t c : channels_) units += units_of(c);
    return {units * unit_channels(precision_), inputs[0].height, inputs[0].width};
  }

  View gather(const Run& run, bool overlap) const {
    Shapes shapes;
    for (const Map& m : run.inputs) shapes.push_back(m.shape);
    const View all = blocked_view(run.temporary, precision_, gathered_shape(shapes));
    int64_t unit = 0;
    for (size_t i = 0; i < channels_.size(); ++i) {
      PointwiseArgs a = {};
      a.a = run.inputs[i].view;
      a.output = all;
      a.output.data += unit * kUnitBytes;
      a.channels = channels_[i];
      a.height = static_cast<int32_t>(shapes[i].height);
      a.width = static_cast<int32_t>(shapes[i].width);
      launch_pointwise(a, precision_, run.batch, run.stream, overlap || i > 0);
      unit += units_of(channels_[i]);
    }
    return all;
  }

  const bool separable_;
  std::vector<int32_t> channels_;  // of the maps that are concatenated
  int32_t taps_ = 9;
  int64_t out_channels_ = 0;
  Packing packing_;
  bool transforms_ = false;  // by Winograd's way
  WinogradPacking winograd_packing_;
  bool by_warpgroups_ = false;  // with Hopper's products
  WgmmaPacking wgmma_packing_;
  // A 1x1 convolution of the result, done in the same launch.
  const ConvolutionStep* tail_ = nullptr;
  Packing tail_packing_;
};

// Launches what is computed pixel by pixel for the layer's result.
void launch_pixels(PointwiseArgs a, const Run& run, Precision precision) {
  a.output = run.output.view;
  a.channels = static_cast<int32_t>(run.output.shape.channels);
  a.height = static_cast<int32_t>(run.output.shape.height);
  a.width = static_cast<int32_t>(run.output.shape.width);
  launch_pointwise(a, precision, run.batch, run.stream, run.overlap);
}

// Normalisation, or a function of every element: two numbers for each channel.
class TableStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override {
    check_channels(inputs[0], static_cast<int64_t>(first().size()), "x");
    return inputs[0];
  }
  int64_t packed_bytes() const override { return static_cast<int64_t>(first().size()) * 8; }

  void pack(const Weights&, unsigned char* packed, device::Stream stream) const override {
    std::vector<float> values = first();
    const std::vector<float>& second = layer_.op == Op::kNormalize ? layer_.scale : layer_.high;
    values.insert(values.end(), second.begin(), second.end());
    auto* out = reinterpret_cast<float*>(packed);
    for (size_t first = 0; first < values.size(); first += kMostConstants) {
      ConstantsArgs a = {};
      a.count = static_cast<int32_t>(std::min<size_t>(kMostConstants, values.size() - first));
      std::copy_n(values.begin() + static_cast<int64_t>(first), a.count, a.values);
      a.out = out + first;
      launch_constants(a, stream);
    }
  }

  void run(const Run& run) const override {
    PointwiseArgs a = {};
    a.a = run.inputs[0].view;
    a.function = layer_.function;
    a.first = reinterpret_cast<const float*>(run.packed);
    a.second = a.first + first().size();
    launch_pixels(a, run, precision_);
  }

 private:
  const std::vector<float>& first() const { return layer_.op == Op::kNormalize ? layer_.shift : layer_.low; }
};

// Sum or product of two maps, element by element; the second may have one channel, which is that of all of the first,
// and in a sum one pixel, which is that of all too.
class PairStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override {
    if (inputs[1].channels != 1) check_channels(inputs[1], inputs[0].channels, "b");
    if (!layer_.adds_to_every) check_same_size(inputs[0], inputs[1], "b");
    return inputs[0];
  }

  void run(const Run& run) const override {
    PointwiseArgs a = {};
    a.a = run.inputs[0].view;
    a.b = run.inputs[1].view;
    if (run.inputs[1].shape.channels == 1 && run.output.shape.channels > 1) {
      a.b.channel = 0;
      a.b.blocked = false;  // read value by value
    }
    if (layer_.adds_to_every) a.b.row = a.b.pixel = 0;
    a.multiplies = layer_.op == Op::kMultiply;
    launch_pixels(a, run, precision_);
  }
};

// Some of a map's channels.
class SliceStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override {
    STD_TORCH_CHECK(layer_.start + layer_.channels <= inputs[0].channels, layer_.name(), ": x has ", inputs[0].channels,
                    " channels, ", layer_.start + layer_.channels, " are needed");
    return {layer_.channels, inputs[0].height, inputs[0].width};
  }

  void run(const Run& run) const override {
    PointwiseArgs a = {};
    a.a = run.inputs[0].view;
    a.a.data += layer_.start * a.a.channel;
    a.a.blocked = false;  // it may begin within a unit
    launch_pixels(a, run, precision_);
  }
};

class ResizeStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override {
    const int64_t r = layer_.upscale_factor;
    return {inputs[0].channels, inputs[0].height * r, inputs[0].width * r};
  }

  void run(const Run& run) const override {
    const Shape& shape = run.inputs[0].shape;
    EnlargeArgs a = {};
    a.input = run.inputs[0].view;
    a.output = run.output.view;
    a.channels = static_cast<int32_t>(shape.channels);
    a.height = static_cast<int32_t>(shape.height);
    a.width = static_cast<int32_t>(shape.width);
    a.factor = static_cast<int32_t>(layer_.upscale_factor);
    for (int32_t k = 0; k < a.factor; ++k) a.taps[k] = resize_taps(layer_.resize, a.factor, k);
    launch_enlarge(a, precision_, run.batch, run.stream, run.overlap);
  }
};

// As many pixels a side as the layer's divisor goes into it.
class AdaptiveMaxPoolStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override {
    const Shape &x = inputs[0], out{x.channels, x.height / layer_.divisor, x.width / layer_.divisor};
    const bool empty = x.height == 0 || x.width == 0;
    STD_TORCH_CHECK(empty || (out.height > 0 && out.width > 0), layer_.name(), ": x is ", x.height, "x", x.width,
                    ", must have at least ", layer_.divisor, " pixels a side");
    return out;
  }

  void run(const Run& run) const override {
    const Shape &x = run.inputs[0].shape, &out = run.output.shape;
    AdaptiveMaxPoolArgs a = {};
    a.input = run.inputs[0].view;
    a.output = run.output.view;
    a.channels = static_cast<int32_t>(x.channels);
    a.height = static_cast<int32_t>(x.height);
    a.width = static_cast<int32_t>(x.width);
    a.pooled_height = static_cast<int32_t>(out.height);
    a.pooled_width = static_cast<int32_t>(out.width);
    launch_adaptive_max_pool(a, precision_, run.batch, run.stream, run.overlap);
  }
};

class StatisticStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override { return {inputs[0].channels, 1, 1}; }

  int64_t temporary_bytes(const Shapes& inputs, int64_t batch) const override {
    return statistic_bytes(arguments(inputs[0]), batch);
  }

  void run(const Run& run) const override {
    StatisticArgs a = arguments(run.inputs[0].shape);
    a.input = run.inputs[0].view;
    a.output = run.output.view;
    launch_statistic(a, precision_, run.batch, run.temporary, run.stream, run.overlap);
  }

 private:
  StatisticArgs arguments(const Shape& x) const {
    StatisticArgs a = {};
    a.height = static_cast<int32_t>(x.height);
    a.width = static_cast<int32_t>(x.width);
    a.channels = static_cast<int32_t>(x.channels);
    a.kind = layer_.statistic;
    a.correction = static_cast<int32_t>(layer_.correction);
    return a;
  }
};

class ModulateStep : public Step {
 public:
  using Step::Step;

  Shape result(const Shapes& inputs) const override {
    for (size_t k = 1; k < inputs.size(); ++k) check_channels(inputs[k], inputs[0].channels, "a map");
    return inputs[0];
  }

  void run(const Run& run) const override {
    const Shape& shape = run.output.shape;
    ModulateArgs a = {};
    a.input = run.inputs[0].view;
    a.output = run.output.view;
    a.count = static_cast<int32_t>(run.inputs.size()) - 1;
    for (int32_t k = 0; k < a.count; ++k) {
      const Map& map = run.inputs[static_cast<size_t>(k) + 1];
      a.maps[k].view = map.view;
      a.maps[k].height = static_cast<int32_t>(map.shape.height);
      a.maps[k].width = static_cast<int32_t>(map.shape.width);
    }
    a.bilinear = layer_.resize == Resize::kBilinear;
    a.channels = static_cast<int32_t>(shape.channels);
    a.height = static_cast<int32_t>(shape.height);
    a.width = static_cast<int32_t>(shape.width);
    a.activation = layer_.activation;
    a.slope = layer_.slope;
    launch_modulate(a, precision_, run.batch, run.stream, run.overlap);
  }
};

// Layers that compute every channel with numbers of its own: a weight and a bias, kept as float32.
class ChannelwiseStep : public Step {
 public:
  int64_t packed_bytes() const override { return bias_at() + bytes(weights_[1]); }

  void pack(const Weights& weights, unsigned char* packed, device::Stream stream) const override {
    for (size_t k = 0; k < 2; ++k) {
      if (layer_.weights[k] < 0) continue;
      auto* out = reinterpret_cast<float*>(packed + (k == 0 ? 0 : bias_at()));
      launch_weight_copy(weights[static_cast<size_t>(layer_.weights[k])], out, stream);
    }
  }

 protected:
  ChannelwiseStep(const Layer& layer, Precision precision, const Weights& weights,
                  const std::vector<int64_t>& weight_shape, int64_t channels)
      : Step(layer, precision) {
    weights_[0] = weight_of(0, weights, "weight", weight_shape);
    weights_[1] = weight_of(1, weights, "bias", {channels});
  }

  WeightView weight(const Run& run) const { return view(0, run.packed); }
  WeightView bias(const Run& run) const { return view(1, run.packed + bias_at()); }
  const WeightView& compiled_weight() const { return weights_[0]; }

 private:
  WeightView view(size_t k, const unsigned char* packed) const {
    return layer_.weights[k] < 0 ? WeightView{} : copied_weight(weights_[k], packed);
  }
  static int64_t bytes(const WeightView& w) {
    int64_t count = w.dimensions == 0 ? 0 : 4;
    for (int d = 0; d < w.dimensions; ++d) count *= w.sizes[d];
    return count;
  }
  int64_t bias_at() const { return bytes(weights_[0]); }

  WeightView weights_[2];  // as they were when the plan was compiled: their sizes
};

class DepthwiseStep : public ChannelwiseStep {
 public:
  DepthwiseStep(const Layer& layer, Precision precision, const Weights& weights, const Shapes& inputs)
      : ChannelwiseStep(layer, precision, weights, {inputs[0].channels, 1, -1, -1}, inputs[0].channels),
        channels_(inputs[0].channels) {
    check_depthwise(layer.name(), channels_, layer.gated, compiled_weight());
  }

  Shape result(const Shapes& inputs) const override {
    check_channels(inputs[0], channels_, "x");
    return {layer_.gated ? channels_ / 2 : channels_, inputs[0].height, inputs[0].width};
  }

  void run(const Run& run) const override {
    const Shape& shape = run.output.shape;
    DepthwiseArgs a = {};
    set_depthwise(a, channels_, shape.height, shape.width, layer_.gated, weight(run), layer_.dilation);
    set_halves(a, run.inputs[0].view, precision_, a.input);
    a.output[0] = run.output.view;
    a.bias = bias(run);
    a.activation = layer_.activation;
    a.slope = layer_.slope;
    launch_depthwise(a, precision_, run.batch, run.stream, run.overlap);
  }

 private:
  const int64_t channels_;  // of the input
};

class LayerNormStep : public ChannelwiseStep {
 public:
  LayerNormStep(const Layer& layer, Precision precision, const Weights& weights)
      : ChannelwiseStep(layer, precision, weights, {layer.channels}, layer.channels) {}

  Shape result(const Shapes& inputs) const override {
    check_channels(inputs[0], layer_.channels, "x");
    return inputs[0];
  }

  void run(const Run& run) const override {
    LayerNormArgs a = {};
    a.input = run.inputs[0].view;
    a.output = run.output.view;
    a.weight = weight(run);
    a.bias = bias(run);
    a.eps = layer_.epsilon;
    a.height = static_cast<int32_t>(run.output.shape.height);
    a.width = static_cast<int32_t>(run.output.shape.width);
    a.channels = static_cast<int32_t>(run.output.shape.channels);
    launch_layer_norm(a, precision_, run.batch, run.stream, run.overlap);
  }
};

}  // namespace

std::unique_ptr<Step> make_convolution(const Layer& layer, Precision precision, const Weights& weights,
                                       const Shapes& inputs, bool network) {
  return std::make_unique<ConvolutionStep>(layer, precision, weights, inputs, network);
}
std::unique_ptr<Step> make_table(const Layer& layer, Precision precision) {
  return std::make_unique<TableStep>(layer, precision);
}
std::unique_ptr<Step> make_weightless(const Layer& layer, Precision precision) {
  switch (layer.op) {
    case Op::kSlice:
      return std::make_unique<SliceStep>(layer, precision);
    case Op::kResize:
      return std::make_unique<ResizeStep>(layer, precision);
    case Op::kAdaptiveMaxPool:
      return std::make_unique<AdaptiveMaxPoolStep>(layer, precision);
    case Op::kModulate:
      return std::make_unique<ModulateStep>(layer, precision);
    case Op::kStatistic:
      return std::make_unique<StatisticStep>(layer, precision);
    default:
      return std::make_unique<PairStep>(layer, precision);
  }
}
std::unique_ptr<Step> make_channelwise(const Layer& layer, Precision precision, const Weights& weights,
                                       const Shapes& inputs) {
  if (layer.op == Op::kLayerNorm2d) return std::make_unique<LayerNormStep>(layer, precision, weights);
  return std::make_unique<DepthwiseStep>(layer, precision, weights, inputs);
}

}  // namespace esr::cuda
