// The program of a plan: a network as a list of int64, checked and turned into structures.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "activation.h"
#include "resize.h"
#include "statistic.h"

namespace esr {

enum class Op : int32_t {
  kNormalize = 0,
  kConv3x3 = 1,
  kConv1x1 = 2,
  kConv3x3PixelShuffle = 3,
  kEsa = 4,
  kBsconv = 5,
  kAdd = 6,
  kMultiply = 7,
  kActivate = 8,
  kDepthwiseConv = 9,
  kLayerNorm2d = 10,
  kSlice = 11,
  kResize = 12,
  kAdaptiveMaxPool = 13,
  kModulate = 14,
  kStatistic = 15,
};
inline constexpr int64_t kOpCount = 16;

inline const char* op_name(Op op) {
  constexpr const char* kNames[kOpCount] = {
      "normalize", "conv3x3",  "conv1x1",        "conv3x3_pixel_shuffle", "esa",   "bsconv", "add",
      "multiply",  "activate", "depthwise_conv", "layer_norm2d",          "slice", "resize", "adaptive_max_pool",
      "modulate",  "statistic"};
  return kNames[static_cast<int32_t>(op)];
}

struct Layer {
  Op op = Op::kAdd;
  int64_t index = 0;            // position in the plan
  std::vector<int64_t> inputs;  // values; a residual comes last
  bool has_residual = false;
  std::vector<int64_t> weights;  // indices, -1: none; in the order of the format's description
  Activation activation = Activation::kNone;
  float slope = 0.0f;
  ResidualMode residual_mode = ResidualMode::kNone;
  int64_t upscale_factor = 1;
  bool reflect = false;
  std::vector<float> shift, scale;  // of a normalize, one for each channel
  Function function = Function::kNone;
  std::vector<float> low, high;  // of an activate, one for each channel
  int64_t dilation = 1;
  bool gated = false;    // act(first half of the channels) * second half
  int64_t channels = 0;  // of a layer_norm2d or slice
  float epsilon = 0.0f;
  int64_t start = 0;  // the first channel of a slice
  Resize resize = Resize::kNearest;
  int64_t divisor = 1;  // of an adaptive_max_pool: how often a side of the result goes into that of the input
  Statistic statistic = Statistic::kMean;
  int64_t correction = 0;      // of a statistic: squares are divided by the pixels less that
  bool one_pixel = false;      // the result has one pixel, whatever the image's size
  bool adds_to_every = false;  // of an add: b has one pixel, which is added to every one of a

  // How many of the inputs are no residual.
  size_t operands() const { return inputs.size() - (has_residual ? 1 : 0); }
  std::string name() const { return "layer " + std::to_string(index) + " (" + op_name(op) + ")"; }
};

struct Program {
  int64_t inputs = 0;
  std::vector<Layer> layers;
  std::vector<int64_t> outputs;

  int64_t values() const { return inputs + static_cast<int64_t>(layers.size()); }
};

class ProgramReader {
 public:
  ProgramReader(const std::vector<int64_t>& program, const std::vector<double>& constants, int64_t weight_count)
      : program_(program), constants_(constants), weight_count_(weight_count), end_(program.size()) {}

  Program read() {
    const int64_t format = next("format");
    STD_TORCH_CHECK(format == kFormat, "plan: format ", format, " is not supported, this library reads format ",
                    kFormat);
    Program p;
    p.inputs = next("inputs");
    const int64_t layers = next("layers");
    const int64_t outputs = next("outputs");
    const int64_t size = static_cast<int64_t>(program_.size());
    STD_TORCH_CHECK(p.inputs >= 1 && p.inputs <= kMaxInputs, "plan: ", p.inputs, " inputs, allowed are 1..",
                    kMaxInputs);
    STD_TORCH_CHECK(layers >= 1 && layers <= size, "plan: ", layers, " layers announced, must be 1 or more and fit");
    STD_TORCH_CHECK(outputs >= 1 && outputs <= size, "plan: ", outputs,
                    " outputs announced, must be 1 or more and fit");
    for (int64_t k = 0; k < layers; ++k) p.layers.push_back(read_layer(k, p.inputs + k));
    end_ = program_.size();
    for (int64_t i = 0; i < outputs; ++i) p.outputs.push_back(value("output value", p.values()));
    STD_TORCH_CHECK(position_ == end_, "plan: ", end_ - position_, " integers follow the last output");
    for (const Layer& layer : p.layers) {
      for (const int64_t v : layer.inputs) {
        const bool shuffled = v >= p.inputs && p.layers[v - p.inputs].op == Op::kConv3x3PixelShuffle;
        STD_TORCH_CHECK(!shuffled, "plan: ", layer.name(), " reads value ", v,
                        ", the result of a conv3x3_pixel_shuffle, which can only be an output");
      }
    }
    find_pixels(p);
    return p;
  }

 private:
  static constexpr int64_t kFormat = 2;
  static constexpr int64_t kMaxInputs = 1024;

  int64_t next(const char* what) {
    STD_TORCH_CHECK(position_ < end_, "plan: the program ends where ", what, " is expected (position ", position_, ")");
    return program_[position_++];
  }

  int64_t value(const char* what, int64_t defined) {
    const int64_t v = next(what);
    STD_TORCH_CHECK(v >= 0 && v < defined, "plan: ", what, " is ", v, ", defined so far are 0..", defined - 1);
    return v;
  }

  int64_t choice(const char* what, int64_t count) {
    const int64_t v = next(what);
    STD_TORCH_CHECK(v >= 0 && v < count, "plan: ", what, " is ", v, ", must be 0..", count - 1);
    return v;
  }

  void weight(Layer& layer, const char* what, bool required) {
    const int64_t w = next(what);
    STD_TORCH_CHECK(w >= (required ? 0 : -1) && w < weight_count_, "plan: weight index ", what, " of ", layer.name(),
                    " is ", w, ", there are ", weight_count_, " weights");
    layer.weights.push_back(w);
  }

  double constant(const char* what, int64_t index) {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(constants_.size()), "plan: constant index of ", what,
                    " is ", index, ", there are ", constants_.size(), " constants");
    return constants_[index];
  }

  void activation(Layer& layer) {
    layer.activation = static_cast<Activation>(choice("activation", kActivationCount));
    const int64_t index = next("negative slope");
    // Only a leaky ReLU has a slope: other layers may give any index.
    if (layer.activation == Activation::kLeakyRelu) layer.slope = static_cast<float>(constant("negative slope", index));
  }

  void residual(Layer& layer, int64_t defined) {
    const int64_t v = next("residual");
    STD_TORCH_CHECK(v >= -1 && v < defined, "plan: residual of ", layer.name(), " is ", v, ", defined so far are 0..",
                    defined - 1, " (-1: none)");
    if (v >= 0) {
      layer.inputs.push_back(v);
      layer.has_residual = true;
    }
  }

  ResidualMode residual_mode(Layer& layer, int64_t count) {
    const auto mode = static_cast<ResidualMode>(choice("residual_mode", count));
    if (layer.has_residual) layer.residual_mode = mode;
    return mode;
  }

  // Which values have one pixel, and that layers can read them. Plans have no such inputs.
  static void find_pixels(Program& p) {
    const auto is_pixel = [&](int64_t v) {
      return v >= p.inputs && p.layers[static_cast<size_t>(v - p.inputs)].one_pixel;
    };
    for (Layer& layer : p.layers) {
      const bool first = is_pixel(layer.inputs[0]);
      layer.one_pixel = first || layer.op == Op::kStatistic;
      STD_TORCH_CHECK(!first || (layer.op != Op::kResize && layer.op != Op::kConv3x3PixelShuffle),
                      "plan: ", layer.name(), " enlarges value ", layer.inputs[0], ", which is one pixel");
      for (const int64_t v : layer.inputs) {
        const bool takes_both = is_pixel(v) && (layer.op == Op::kAdd || layer.op == Op::kModulate);
        STD_TORCH_CHECK(is_pixel(v) == first || takes_both, "plan: ", layer.name(), " reads values ", layer.inputs[0],
                        " and ", v, ", one of which is one pixel");
        layer.adds_to_every = layer.adds_to_every || (layer.op == Op::kAdd && is_pixel(v) != first);
      }
    }
    for (const int64_t v : p.outputs) {
      STD_TORCH_CHECK(!is_pixel(v), "plan: output ", v, " is one pixel, which can only be read by layers");
    }
  }

  Layer read_layer(int64_t index, int64_t defined) {
    end_ = program_.size();
    Layer layer;
    layer.index = index;
    layer.op = static_cast<Op>(choice("operator", kOpCount));
    const int64_t count = next("length of a layer");
    STD_TORCH_CHECK(count >= 0 && count <= static_cast<int64_t>(end_ - position_), "plan: ", layer.name(),
                    " announces ", count, " integers, ", end_ - position_, " are left");
    end_ = position_ + static_cast<size_t>(count);
    switch (layer.op) {
      case Op::kNormalize:
        layer.inputs.push_back(value("x", defined));
        read_table(layer, layer.shift, layer.scale);
        break;
      case Op::kConv3x3: {
        layer.inputs.push_back(value("x", defined));
        weight(layer, "weight", true);
        weight(layer, "bias", false);
        activation(layer);
        residual(layer, defined);
        const ResidualMode mode = residual_mode(layer, kPublicResidualModeCount);
        STD_TORCH_CHECK(mode != ResidualMode::kAttention || layer.has_residual, "plan: ", layer.name(),
                        " has residual_mode attention and no residual");
        STD_TORCH_CHECK(mode != ResidualMode::kAttention || layer.activation == Activation::kNone,
                        "plan: ", layer.name(), " has residual_mode attention, which allows no activation");
        break;
      }
      case Op::kConv1x1: {
        const int64_t n = next("number of inputs");
        STD_TORCH_CHECK(n >= 1 && n <= kMaxConcatenated, "plan: ", layer.name(), " has ", n, " inputs, allowed are 1..",
                        kMaxConcatenated);
        for (int64_t i = 0; i < n; ++i) layer.inputs.push_back(value("x", defined));
        weight(layer, "weight", true);
        weight(layer, "bias", false);
        activation(layer);
        residual(layer, defined);
        residual_mode(layer, kSumModeCount);
        break;
      }
      case Op::kConv3x3PixelShuffle:
        layer.inputs.push_back(value("x", defined));
        weight(layer, "weight", true);
        weight(layer, "bias", false);
        layer.upscale_factor = next("upscale_factor");
        STD_TORCH_CHECK(layer.upscale_factor >= 1 && layer.upscale_factor <= 1024, "plan: upscale_factor of ",
                        layer.name(), " is ", layer.upscale_factor, ", must be 1..1024");
        residual(layer, defined);
        break;
      case Op::kEsa: {
        layer.inputs.push_back(value("x", defined));
        constexpr const char* kNames[] = {"w1", "b1", "w2", "b2",    "w3",    "b3",  "w4",
                                          "b4", "wf", "bf", "w_max", "b_max", "w3_", "b3_"};
        for (int i = 0; i < 14; ++i) weight(layer, kNames[i], i < 8 && i % 2 == 0);
        STD_TORCH_CHECK((layer.weights[10] < 0) == (layer.weights[12] < 0), "plan: ", layer.name(),
                        " needs both w_max and w3_ or neither");
        break;
      }
      case Op::kBsconv:
        layer.inputs.push_back(value("x", defined));
        weight(layer, "pointwise", true);
        weight(layer, "depthwise", true);
        weight(layer, "bias", false);
        layer.reflect = choice("padding_mode", 2) == 1;
        activation(layer);
        residual(layer, defined);
        residual_mode(layer, kSumModeCount);
        break;
      case Op::kAdd:
      case Op::kMultiply:
        layer.inputs.push_back(value("a", defined));
        layer.inputs.push_back(value("b", defined));
        break;
      case Op::kActivate:
        layer.inputs.push_back(value("x", defined));
        layer.function = static_cast<Function>(choice("function", kFunctionCount));
        STD_TORCH_CHECK(layer.function != Function::kNone, "plan: ", layer.name(), " has no function");
        read_table(layer, layer.low, layer.high);
        break;
      case Op::kDepthwiseConv:
        layer.inputs.push_back(value("x", defined));
        weight(layer, "weight", true);
        weight(layer, "bias", false);
        layer.dilation = next("dilation");
        STD_TORCH_CHECK(layer.dilation >= 1 && layer.dilation <= kMostDilation, "plan: dilation of ", layer.name(),
                        " is ", layer.dilation, ", must be 1..", kMostDilation);
        layer.gated = choice("gated", 2) == 1;
        activation(layer);
        break;
      case Op::kLayerNorm2d:
        layer.inputs.push_back(value("x", defined));
        weight(layer, "weight", false);
        weight(layer, "bias", false);
        layer.channels = next("channels");
        STD_TORCH_CHECK(layer.channels >= 1 && layer.channels <= kMostChannels, "plan: ", layer.name(), " has ",
                        layer.channels, " channels, must be 1..", kMostChannels);
        layer.epsilon = static_cast<float>(constant("epsilon", next("epsilon")));
        break;
      case Op::kSlice:
        layer.inputs.push_back(value("x", defined));
        layer.start = next("start");
        layer.channels = next("channels");
        STD_TORCH_CHECK(
            layer.start >= 0 && layer.start <= kMostChannels && layer.channels >= 1 && layer.channels <= kMostChannels,
            "plan: ", layer.name(), " takes ", layer.channels, " channels from ", layer.start, " on");
        break;
      case Op::kResize:
        layer.inputs.push_back(value("x", defined));
        layer.resize = static_cast<Resize>(choice("mode", kResizeCount));
        layer.upscale_factor = next("upscale_factor");
        STD_TORCH_CHECK(layer.upscale_factor >= 1 && layer.upscale_factor <= kMostResize, "plan: upscale_factor of ",
                        layer.name(), " is ", layer.upscale_factor, ", must be 1..", kMostResize);
        break;
      case Op::kAdaptiveMaxPool:
        layer.inputs.push_back(value("x", defined));
        layer.divisor = next("divisor");
        STD_TORCH_CHECK(layer.divisor >= 1 && layer.divisor <= kMostDilation, "plan: divisor of ", layer.name(), " is ",
                        layer.divisor, ", must be 1..", kMostDilation);
        break;
      case Op::kModulate: {
        const int64_t n = next("number of maps");
        STD_TORCH_CHECK(n >= 1 && n <= kMostModulateMaps, "plan: ", layer.name(), " has ", n, " maps, allowed are 1..",
                        kMostModulateMaps);
        for (int64_t i = 0; i <= n; ++i) layer.inputs.push_back(value(i == 0 ? "x" : "a map", defined));
        layer.resize = static_cast<Resize>(choice("mode", kBlendModeCount));
        activation(layer);
        break;
      }
      case Op::kStatistic:
        layer.inputs.push_back(value("x", defined));
        layer.statistic = static_cast<Statistic>(choice("kind", kStatisticCount));
        layer.correction = choice("correction", 2);
        break;
    }
    STD_TORCH_CHECK(position_ == end_, "plan: ", layer.name(), " has ", end_ - position_, " integers too many");
    end_ = program_.size();
    return layer;
  }

  // Two numbers for each channel: all of the first, then all of the second.
  void read_table(const Layer& layer, std::vector<float>& first, std::vector<float>& second) {
    const int64_t channels = next("channels");
    const int64_t start = next("first constant");
    const int64_t size = static_cast<int64_t>(constants_.size());
    STD_TORCH_CHECK(channels >= 1 && start >= 0 && start <= size && channels <= (size - start) / 2,
                    "plan: ", layer.name(), " reads two numbers for each of ", channels, " channels from constant ",
                    start, " on, there are ", size, " constants");
    for (int64_t c = 0; c < channels; ++c) {
      first.push_back(static_cast<float>(constants_[start + c]));
      second.push_back(static_cast<float>(constants_[start + channels + c]));
    }
  }

  static constexpr int64_t kMaxConcatenated = 64;
  static constexpr int64_t kMostDilation = int64_t{1} << 24;  // larger than any image's side
  static constexpr int64_t kMostChannels = int64_t{1} << 20;  // where no weights tell

  const std::vector<int64_t>& program_;
  const std::vector<double>& constants_;
  int64_t weight_count_;
  size_t position_ = 0;
  size_t end_;
};

}  // namespace esr
