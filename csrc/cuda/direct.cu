// Operators that are limited by memory, and their gradients, registered with PyTorch's dispatcher: no plan, each reads
// and writes the tensors where they are.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "adaptive_max_pool.h"
#include "backward.h"
#include "depthwise.h"
#include "layer_norm.h"
#include "library.h"
#include "modulate.h"

namespace esr::cuda {
namespace {

using torch::stable::Tensor;

// An operator's one result, given in a list as gradients are.
const Tensor& only(const char* name, const std::vector<Tensor>& outputs) {
  STD_TORCH_CHECK(outputs.size() == 1, name, ": ", outputs.size(), " results given, must be 1");
  return outputs[0];
}

// What the convolution and its gradients have in common.
struct Depthwise {
  DepthwiseArgs args = {};
  Shape input, result;

  Depthwise(Tensors& t, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t dilation,
            int64_t activation, double slope, bool gated) {
    const Map in = t.map(x, "x");
    input = result = in.shape;
    STD_TORCH_CHECK(dilation >= 1, t.name(), ": dilation is ", dilation, ", must be at least 1");
    const WeightView taps = t.weight(weight, "weight", {input.channels, 1, -1, -1});
    check_depthwise(t.name(), input.channels, gated, taps);
    set_depthwise(args, input.channels, input.height, input.width, gated, taps, dilation);
    result.channels = args.channels;
    args.bias = t.bias(bias, "bias", input.channels);
    args.activation = activation_of(t.name(), activation);
    args.slope = static_cast<float>(slope);
    set_halves(args, in.view, t.precision(), args.input);
  }
};

void depthwise_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t dilation, int64_t activation,
                    double slope, bool gated, int64_t precision, std::vector<Tensor> outputs) {
  Tensors t("depthwise_conv", precision);
  Depthwise d(t, x, weight, bias, dilation, activation, slope, gated);
  d.args.output[0] = t.map(only(t.name(), outputs), "the result", d.result, Access::kWrite).view;
  if (t.batch() == 0) return;
  const DeviceScope scope(x);
  launch_depthwise(d.args, t.precision(), t.batch(), scope.stream(), false);
}

void depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t dilation,
                             int64_t activation, double slope, bool gated, int64_t precision,
                             std::vector<Tensor> gradients) {
  Tensors t("depthwise_conv_backward", precision);
  t.check_count(gradients, 3);
  const Depthwise d(t, x, weight, bias, dilation, activation, slope, gated);
  const Map g = t.map(grad, "grad", d.result);
  const Map to_x = t.to_map(gradients[0], "the gradient to x", d.input);
  const WeightView to_weight = t.to_weight(gradients[1], "the gradient to weight", d.args.weight);
  const WeightView to_bias = t.to_bias(gradients[2], "the gradient to bias", d.input.channels);
  if (t.batch() == 0) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    const bool sums = to_weight.data != nullptr || to_bias.data != nullptr;
    if (to_x.view.data == nullptr && !sums) return;
    View to_h[2] = {g.view, {}};
    if (gated || d.args.activation != Activation::kNone) {
      // Halves are maps of their own, so that both are whole units.
      for (int i = 0; i < d.args.halves; ++i) to_h[i] = s.map(d.result).view;
      s.launch([&](device::Stream stream, bool overlap) {
        DepthwiseArgs a = d.args;
        a.given = g.view;
        for (int i = 0; i < a.halves; ++i) a.output[i] = to_h[i];
        launch_depthwise(a, s.precision(), s.batch(), stream, overlap);
      });
    }
    if (to_x.view.data != nullptr) {
      s.launch([&](device::Stream stream, bool overlap) {
        DepthwiseArgs a = d.args;
        for (int i = 0; i < a.halves; ++i) a.input[i] = to_h[i];
        set_halves(d.args, to_x.view, s.precision(), a.output);
        a.bias = {};
        a.activation = Activation::kNone;
        a.gated = false;
        a.flip = true;
        launch_depthwise(a, s.precision(), s.batch(), stream, overlap);
      });
    }
    if (!sums) return;
    DepthwiseGradientArgs a = {};
    for (int i = 0; i < d.args.halves; ++i) a.input[i] = d.args.input[i], a.given[i] = to_h[i];
    a.weight = to_weight;
    a.bias = to_bias;
    a.halves = d.args.halves;
    a.height = d.args.height;
    a.width = d.args.width;
    a.channels = d.args.channels;
    a.taps_down = d.args.taps_down;
    a.taps_across = d.args.taps_across;
    a.dilation = d.args.dilation;
    unsigned char* const workspace = s.take(depthwise_gradient_bytes(a, s.batch()));
    s.launch([&](device::Stream stream, bool overlap) {
      launch_depthwise_gradient(a, s.precision(), s.batch(), workspace, stream, overlap);
    });
  });
}

// The normalisation of `x`; what it is called with goes into `in`.
LayerNormArgs normalization(Tensors& t, const Tensor& x, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, double eps, Map& in) {
  in = t.map(x, "x");
  LayerNormArgs a = {};
  a.input = in.view;
  a.weight = t.bias(weight, "weight", in.shape.channels);
  a.bias = t.bias(bias, "bias", in.shape.channels);
  a.eps = static_cast<float>(eps);
  a.height = static_cast<int32_t>(in.shape.height);
  a.width = static_cast<int32_t>(in.shape.width);
  a.channels = static_cast<int32_t>(in.shape.channels);
  return a;
}

void layer_norm2d(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, int64_t precision,
                  std::vector<Tensor> outputs) {
  Tensors t("layer_norm2d", precision);
  Map in;
  LayerNormArgs a = normalization(t, x, weight, bias, eps, in);
  a.output = t.map(only(t.name(), outputs), "the result", in.shape, Access::kWrite).view;
  if (t.batch() == 0) return;
  const DeviceScope scope(x);
  launch_layer_norm(a, t.precision(), t.batch(), scope.stream(), false);
}

void layer_norm2d_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, double eps, int64_t precision,
                           std::vector<Tensor> gradients) {
  Tensors t("layer_norm2d_backward", precision);
  t.check_count(gradients, 3);
  LayerNormGradientArgs a = {};
  Map in;
  a.forward = normalization(t, x, weight, std::nullopt, eps, in);
  a.given = t.map(grad, "grad", in.shape).view;
  a.forward.output = t.to_map(gradients[0], "the gradient to x", in.shape).view;
  a.to_weight = t.to_bias(gradients[1], "the gradient to weight", in.shape.channels);
  a.to_bias = t.to_bias(gradients[2], "the gradient to bias", in.shape.channels);
  if (t.batch() == 0) return;
  if (a.forward.output.data == nullptr && a.to_weight.data == nullptr && a.to_bias.data == nullptr) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    unsigned char* const workspace = s.take(layer_norm_gradient_bytes(a, s.batch()));
    s.launch([&](device::Stream stream, bool overlap) {
      launch_layer_norm_gradient(a, s.precision(), s.batch(), workspace, stream, overlap);
    });
  });
}

// x, which windows and resized maps refer to.
Map map_with_pixels(Tensors& t, const Tensor& x) {
  const Map m = t.map(x, "x");
  STD_TORCH_CHECK(m.shape.height > 0 && m.shape.width > 0, t.name(), ": x has no pixels");
  return m;
}

// A map that has the channels of `like` and a pixel at least.
Map resized_map(Tensors& t, const Tensor& tensor, const std::string& what, const Shape& like, Access access) {
  const Map m = t.map(tensor, what.c_str(), access);
  STD_TORCH_CHECK(m.shape.channels == like.channels && m.shape.height > 0 && m.shape.width > 0, t.name(), ": ", what,
                  " has ", m.shape.channels, " channels of ", m.shape.height, "x", m.shape.width,
                  " pixels, must have those of x and at least one pixel");
  return m;
}

// The pooling of `x` to `pooled`, the result or its gradient.
AdaptiveMaxPoolArgs pooling(const Map& x, const Shape& pooled) {
  AdaptiveMaxPoolArgs a = {};
  a.input = x.view;
  a.height = static_cast<int32_t>(x.shape.height);
  a.width = static_cast<int32_t>(x.shape.width);
  a.channels = static_cast<int32_t>(x.shape.channels);
  a.pooled_height = static_cast<int32_t>(pooled.height);
  a.pooled_width = static_cast<int32_t>(pooled.width);
  return a;
}

void adaptive_max_pool(Tensor x, int64_t precision, std::vector<Tensor> outputs) {
  Tensors t("adaptive_max_pool", precision);
  const Map in = map_with_pixels(t, x);
  const Map out = resized_map(t, only(t.name(), outputs), "the result", in.shape, Access::kWrite);
  AdaptiveMaxPoolArgs a = pooling(in, out.shape);
  a.output = out.view;
  if (t.batch() == 0) return;
  const DeviceScope scope(x);
  launch_adaptive_max_pool(a, t.precision(), t.batch(), scope.stream(), false);
}

void adaptive_max_pool_backward(Tensor grad, Tensor x, int64_t precision, std::vector<Tensor> gradients) {
  Tensors t("adaptive_max_pool_backward", precision);
  t.check_count(gradients, 1);
  const Map in = map_with_pixels(t, x);
  const Map g = resized_map(t, grad, "grad", in.shape, Access::kRead);
  AdaptiveMaxPoolGradientArgs a = {};
  a.forward = pooling(in, g.shape);
  a.forward.output = t.to_map(gradients[0], "the gradient to x", in.shape).view;
  a.given = g.view;
  STD_TORCH_CHECK(
      (ceil_div(in.shape.height, g.shape.height) + 1) * (ceil_div(in.shape.width, g.shape.width) + 1) < INT32_MAX,
      t.name(), ": windows have 2^31 pixels or more");
  if (t.batch() == 0 || a.forward.output.data == nullptr) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    unsigned char* const workspace = s.take(adaptive_max_pool_gradient_bytes(a, s.batch()));
    s.launch([&](device::Stream stream, bool overlap) {
      launch_adaptive_max_pool_gradient(a, s.precision(), s.batch(), workspace, stream, overlap);
    });
  });
}

// What `x` is multiplied with; its shape goes into `shape`.
ModulateArgs modulation(Tensors& t, const Tensor& x, const std::vector<Tensor>& maps, bool bilinear, int64_t activation,
                        double slope, Shape& shape) {
  const Map in = map_with_pixels(t, x);
  shape = in.shape;
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= size_t{kMostModulateMaps}, t.name(), ": ", maps.size(),
                  " maps given, must be 1 to ", kMostModulateMaps);
  ModulateArgs a = {};
  a.input = in.view;
  for (const Tensor& tensor : maps) {
    const Map m = resized_map(t, tensor, "map " + std::to_string(a.count), shape, Access::kRead);
    ModulateMap& map = a.maps[a.count++];
    map.view = m.view;
    map.height = static_cast<int32_t>(m.shape.height);
    map.width = static_cast<int32_t>(m.shape.width);
  }
  a.bilinear = bilinear;
  a.height = static_cast<int32_t>(shape.height);
  a.width = static_cast<int32_t>(shape.width);
  a.channels = static_cast<int32_t>(shape.channels);
  a.activation = activation_of(t.name(), activation);
  a.slope = static_cast<float>(slope);
  return a;
}

void modulate(Tensor x, std::vector<Tensor> maps, bool bilinear, int64_t activation, double slope, int64_t precision,
              std::vector<Tensor> outputs) {
  Tensors t("modulate", precision);
  Shape shape;
  ModulateArgs a = modulation(t, x, maps, bilinear, activation, slope, shape);
  a.output = t.map(only(t.name(), outputs), "the result", shape, Access::kWrite).view;
  if (t.batch() == 0) return;
  const DeviceScope scope(x);
  launch_modulate(a, t.precision(), t.batch(), scope.stream(), false);
}

void modulate_backward(Tensor grad, Tensor x, std::vector<Tensor> maps, bool bilinear, int64_t activation, double slope,
                       int64_t precision, std::vector<Tensor> gradients) {
  Tensors t("modulate_backward", precision);
  t.check_count(gradients, maps.size() + 1);
  Shape shape;
  ModulateGradientArgs a = {};
  a.forward = modulation(t, x, maps, bilinear, activation, slope, shape);
  a.given = t.map(grad, "grad", shape).view;
  a.forward.output = t.to_map(gradients[0], "the gradient to x", shape).view;
  ResizeGradientArgs resize = {};
  for (int m = 0; m < a.forward.count; ++m) {
    ModulateMap map = a.forward.maps[m];
    const Shape size{shape.channels, map.height, map.width};
    map.view = t.to_map(gradients[m + 1], "the gradient to a map", size).view;
    if (map.view.data == nullptr) continue;
    if (size.height == shape.height && size.width == shape.width) {
      a.to_sum[a.sums++] = map.view;
    } else {
      resize.to[resize.count++] = map;
    }
  }
  if (t.batch() == 0 || (a.forward.output.data == nullptr && a.sums == 0 && resize.count == 0)) return;
  resize.bilinear = bilinear;
  resize.height = a.forward.height;
  resize.width = a.forward.width;
  resize.channels = a.forward.channels;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    ModulateGradientArgs mine = a;
    // Where no map has the size of x, the gradient to their sum is nobody's.
    if (resize.count > 0 && mine.sums == 0) mine.to_sum[mine.sums++] = s.map(shape).view;
    s.launch([&](device::Stream stream, bool overlap) {
      launch_modulate_gradient(mine, s.precision(), s.batch(), stream, overlap);
    });
    if (resize.count == 0) return;
    ResizeGradientArgs adjoint = resize;
    adjoint.given = mine.to_sum[0];
    s.launch([&](device::Stream stream, bool overlap) {
      launch_resize_gradient(adjoint, s.precision(), s.batch(), stream, overlap);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ESR_LIBRARY, m) {
  m.def(
      "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, int dilation, int activation, float negative_slope, "
      "bool gated, int precision, Tensor(a!)[] outputs) -> ()");
  m.def(
      "depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int dilation, int activation, "
      "float negative_slope, bool gated, int precision, Tensor(a!)[] gradients) -> ()");
  m.def("layer_norm2d(Tensor x, Tensor? weight, Tensor? bias, float eps, int precision, Tensor(a!)[] outputs) -> ()");
  m.def(
      "layer_norm2d_backward(Tensor grad, Tensor x, Tensor? weight, float eps, int precision, "
      "Tensor(a!)[] gradients) -> ()");
  m.def("adaptive_max_pool(Tensor x, int precision, Tensor(a!)[] outputs) -> ()");
  m.def("adaptive_max_pool_backward(Tensor grad, Tensor x, int precision, Tensor(a!)[] gradients) -> ()");
  m.def(
      "modulate(Tensor x, Tensor[] maps, bool bilinear, int activation, float negative_slope, int precision, "
      "Tensor(a!)[] outputs) -> ()");
  m.def(
      "modulate_backward(Tensor grad, Tensor x, Tensor[] maps, bool bilinear, int activation, float negative_slope, "
      "int precision, Tensor(a!)[] gradients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ESR_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_backward", TORCH_BOX(&depthwise_conv_backward));
  m.impl("layer_norm2d", TORCH_BOX(&layer_norm2d));
  m.impl("layer_norm2d_backward", TORCH_BOX(&layer_norm2d_backward));
  m.impl("adaptive_max_pool", TORCH_BOX(&adaptive_max_pool));
  m.impl("adaptive_max_pool_backward", TORCH_BOX(&adaptive_max_pool_backward));
  m.impl("modulate", TORCH_BOX(&modulate));
  m.impl("modulate_backward", TORCH_BOX(&modulate_backward));
}

}  // namespace esr::cuda
