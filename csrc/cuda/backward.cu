// The operators' gradients, registered with PyTorch's dispatcher. Each takes the tensors its gradients go to, an empty
// one where none is wanted.
#include "backward.h"

#include <torch/csrc/stable/library.h>

#include "adjoint.h"
#include "library.h"

namespace esr::cuda {

using torch::stable::Tensor;

namespace {

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

Tensors::Tensors(const char* name, int64_t precision) : name_(name), precision_(static_cast<Precision>(precision)) {
  STD_TORCH_CHECK(precision >= 0 && precision < kPrecisionCount, name, ": precision is ", precision, ", must be 0..",
                  kPrecisionCount - 1);
}

Map Tensors::map(const Tensor& t, const char* what, Access access) {
  const Outside o = read_outside(t, what, 0, precision_, access, memory_);
  if (batch_ < 0) batch_ = o.batch;
  STD_TORCH_CHECK(o.batch == batch_, name_, ": ", what, " has ", o.batch, " images, x has ", batch_);
  return {o.view, o.shape};
}
Map Tensors::map(const Tensor& t, const char* what, const Shape& shape, Access access) {
  const Map m = map(t, what, access);
  STD_TORCH_CHECK(m.shape.channels == shape.channels && m.shape.height == shape.height && m.shape.width == shape.width,
                  name_, ": ", what, " is ", to_string({m.shape.channels, m.shape.height, m.shape.width}), ", must be ",
                  to_string({shape.channels, shape.height, shape.width}));
  return m;
}

WeightView Tensors::weight(const Tensor& t, const char* what, const std::vector<int64_t>& shape, Access access) {
  const WeightView w = esr::cuda::read_weight(t, what, 0, access, memory_);
  bool fits = w.dimensions == static_cast<int32_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 ? w.sizes[i] >= 1 : w.sizes[i] == shape[i];
  STD_TORCH_CHECK(fits, name_, ": ", what, " is ", to_string(std::vector<int64_t>(w.sizes, w.sizes + w.dimensions)),
                  ", must be ", to_string(shape));
  return w;
}
WeightView Tensors::bias(const std::optional<Tensor>& t, const char* what, int64_t channels) {
  return t.has_value() ? weight(*t, what, {channels}) : WeightView{};
}

WeightView Tensors::to_weight(const Tensor& t, const char* what, const WeightView& like) {
  if (t.numel() == 0) return {};
  return weight(t, what, std::vector<int64_t>(like.sizes, like.sizes + like.dimensions), Access::kWrite);
}
WeightView Tensors::to_bias(const Tensor& t, const char* what, int64_t channels) {
  return t.numel() == 0 ? WeightView{} : weight(t, what, {channels}, Access::kWrite);
}
Map Tensors::to_map(const Tensor& t, const char* what, const Shape& shape) {
  return t.numel() == 0 ? Map{} : map(t, what, shape, Access::kWrite);
}

void Tensors::check_count(const std::vector<Tensor>& gradients, size_t count) const {
  STD_TORCH_CHECK(gradients.size() == count, name_, ": ", gradients.size(), " gradients given, must be ", count);
}

Map before_epilogue(Sequence& s, Convolve forward, const Map& g, const View& to_residual) {
  forward.output = s.map(g.shape);
  forward.pass = Pass::kBackward;
  forward.given = g.view;
  forward.second = to_residual;
  s.convolve(forward);
  return forward.output;
}

void data_gradient(Sequence& s, const Convolve& forward, const Map& g, const Map& to_x, Convolve c) {
  c.inputs = {g};
  c.weight = adjoint(forward.weight);
  if (forward.inner.data != nullptr) c.inner = adjoint(forward.inner);
  c.composition = forward.composition;
  // As many zeros around as let every position see all that depend on it.
  c.padding = (forward.weight.sizes[2] - 1) - forward.padding;
  c.output = to_x;
  s.convolve(c);
}

Activation activation_of(const char* name, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < kActivationCount, name, ": activation is ", code, ", must be 0..",
                  kActivationCount - 1);
  return static_cast<Activation>(code);
}

namespace {

void conv3x3_backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                      int64_t activation, double slope, int64_t residual_mode, int64_t precision,
                      std::vector<Tensor> gradients) {
  constexpr const char* kName = "conv3x3_backward";
  Tensors t(kName, precision);
  t.check_count(gradients, 4);
  STD_TORCH_CHECK(residual_mode >= 0 && residual_mode < kPublicResidualModeCount, kName, ": residual_mode is ",
                  residual_mode, ", must be 0..", kPublicResidualModeCount - 1);
  Convolve forward;
  const Map in = t.map(x, "x");
  forward.inputs = {in};
  forward.weight = t.weight(weight, "weight", {-1, in.shape.channels, 3, 3});
  const Shape out{forward.weight.sizes[0], in.shape.height, in.shape.width};
  forward.bias = t.bias(bias, "bias", out.channels);
  forward.padding = 1;
  forward.activation = activation_of(kName, activation);
  forward.slope = static_cast<float>(slope);
  if (residual.has_value()) {
    forward.residual = t.map(*residual, "residual", out).view;
    forward.mode = static_cast<ResidualMode>(residual_mode);
  }
  const Map g = t.map(grad, "grad", out);
  const Map to_x = t.to_map(gradients[0], "the gradient to x", in.shape);
  const WeightView to_weight = t.to_weight(gradients[1], "the gradient to weight", forward.weight);
  const WeightView to_bias = t.to_bias(gradients[2], "the gradient to bias", out.channels);
  const Map to_residual = t.to_map(gradients[3], "the gradient to residual", out);
  if (t.batch() == 0) return;
  const bool linear = forward.activation == Activation::kNone && forward.mode != ResidualMode::kAttention;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    // The residual's gradient is the result's, or comes with the launch that recomputes the convolution.
    View with_h = to_residual.view;
    if (with_h.data != nullptr &&
        (linear || forward.mode == ResidualMode::kPost || forward.mode == ResidualMode::kNone)) {
      s.copy(g.view, to_residual);
      with_h = {};
    }
    const bool others = to_x.view.data != nullptr || to_weight.data != nullptr || to_bias.data != nullptr;
    if (!others && with_h.data == nullptr) return;
    const Map to_h = linear ? g : before_epilogue(s, forward, g, with_h);
    if (to_x.view.data != nullptr) data_gradient(s, forward, to_h, to_x);
    s.weight_gradient(forward, to_h, to_weight, to_bias);
  });
}

// The gradients to the intermediate maps take the place of the maps' pre-activations.
void spab_backward(Tensor grad, std::optional<Tensor> grad_mid, Tensor x, std::vector<Tensor> weights,
                   std::vector<Tensor> biases, int64_t precision, std::vector<Tensor> gradients) {
  Tensors t("spab_backward", precision);
  t.check_count(gradients, 7);
  STD_TORCH_CHECK(weights.size() == 3 && biases.size() == 3, "spab_backward: ", weights.size(), " weights and ",
                  biases.size(), " biases given, must be 3 of each");
  const Map in = t.map(x, "x");
  Convolve forward[3];
  WeightView to_weight[3], to_bias[3];
  Shape shapes[3];
  int64_t channels = in.shape.channels;
  for (size_t i = 0; i < 3; ++i) {
    Convolve& f = forward[i];
    f.weight = t.weight(weights[i], "weight", {i < 2 ? -1 : in.shape.channels, channels, 3, 3});
    channels = f.weight.sizes[0];
    shapes[i] = {channels, in.shape.height, in.shape.width};
    if (biases[i].numel() > 0) f.bias = t.weight(biases[i], "bias", {channels});
    f.padding = 1;
    f.activation = i < 2 ? Activation::kSilu : Activation::kNone;
    to_weight[i] = t.to_weight(gradients[2 * i + 1], "the gradient to weight", f.weight);
    to_bias[i] = t.to_bias(gradients[2 * i + 2], "the gradient to bias", channels);
  }
  const Map g = t.map(grad, "grad", shapes[2]);
  const View g_mid = grad_mid.has_value() ? t.map(*grad_mid, "grad_mid", shapes[0]).view : View{};
  const Map to_x = t.to_map(gradients[0], "the gradient to x", in.shape);
  if (t.batch() == 0) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    Convolve f[3] = {forward[0], forward[1], forward[2]};
    Map h[2];
    for (int i = 0; i < 2; ++i) {
      f[i].inputs = {i == 0 ? in : f[i - 1].output};
      f[i].output = s.map(shapes[i]);
      h[i] = s.map(shapes[i]);
      f[i].second = h[i].view;
      s.convolve(f[i]);
    }
    // The last convolution's result is needed for the attention's derivative only, and never stored.
    f[2].inputs = {f[1].output};
    f[2].residual = in.view;
    f[2].mode = ResidualMode::kAttention;
    const View direct = to_x.view.data == nullptr ? View{} : s.map(in.shape).view;
    const Map to_h3 = before_epilogue(s, f[2], g, direct);
    s.weight_gradient(f[2], to_h3, to_weight[2], to_bias[2]);

    Map to_h = to_h3;
    for (int i = 1; i >= 0; --i) {
      bool wanted = to_x.view.data != nullptr;
      for (int k = 0; k <= i; ++k) wanted = wanted || to_weight[k].data != nullptr || to_bias[k].data != nullptr;
      if (!wanted) return;
      Convolve chain;
      chain.given = h[i].view;
      if (i == 0) chain.residual = g_mid;
      chain.pass = Pass::kChain;
      chain.activation = Activation::kSilu;
      data_gradient(s, f[i + 1], to_h, h[i], chain);
      to_h = h[i];
      s.weight_gradient(f[i], to_h, to_weight[i], to_bias[i]);
    }
    if (to_x.view.data != nullptr) {
      Convolve sum;
      sum.residual = direct;
      sum.mode = ResidualMode::kPost;
      data_gradient(s, f[0], to_h, to_x, sum);
    }
  });
}

void conv3x3_pixel_shuffle_backward(Tensor grad, Tensor x, Tensor weight, int64_t upscale_factor, int64_t precision,
                                    std::vector<Tensor> gradients) {
  constexpr const char* kName = "conv3x3_pixel_shuffle_backward";
  Tensors t(kName, precision);
  t.check_count(gradients, 4);
  const int64_t r = upscale_factor;
  STD_TORCH_CHECK(r >= 1 && r <= 1024, kName, ": upscale_factor is ", r, ", must be 1..1024");
  Convolve forward;
  const Map in = t.map(x, "x");
  forward.inputs = {in};
  forward.weight = t.weight(weight, "weight", {-1, in.shape.channels, 3, 3});
  const int64_t out_channels = forward.weight.sizes[0];
  STD_TORCH_CHECK(out_channels % (r * r) == 0, kName, ": weight has ", out_channels,
                  " output channels, must be a multiple of ", r * r);
  forward.padding = 1;
  const Shape image{out_channels / (r * r), in.shape.height * r, in.shape.width * r};
  const Map g_image = t.map(grad, "grad", image);
  const Map to_x = t.to_map(gradients[0], "the gradient to x", in.shape);
  const WeightView to_weight = t.to_weight(gradients[1], "the gradient to weight", forward.weight);
  const WeightView to_bias = t.to_bias(gradients[2], "the gradient to bias", out_channels);
  const Map to_residual = t.to_map(gradients[3], "the gradient to residual", image);
  if (t.batch() == 0) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    if (to_residual.view.data != nullptr) s.copy(g_image.view, to_residual);
    if (to_x.view.data == nullptr && to_weight.data == nullptr && to_bias.data == nullptr) return;
    const Map g = s.map({out_channels, in.shape.height, in.shape.width});
    s.copy(g_image.view, g, static_cast<int32_t>(r));
    if (to_x.view.data != nullptr) data_gradient(s, forward, g, to_x);
    s.weight_gradient(forward, g, to_weight, to_bias);
  });
}

void conv1x1_backward(Tensor grad, std::vector<Tensor> xs, Tensor weight, std::optional<Tensor> bias,
                      std::optional<Tensor> residual, int64_t activation, double slope, int64_t precision,
                      std::vector<Tensor> gradients) {
  constexpr const char* kName = "conv1x1_backward";
  Tensors t(kName, precision);
  STD_TORCH_CHECK(!xs.empty() && xs.size() <= kMostMaps, kName, ": ", xs.size(), " inputs given, allowed are 1..",
                  kMostMaps);
  t.check_count(gradients, xs.size() + (residual.has_value() ? 3 : 2));
  Convolve forward;
  int64_t channels = 0;
  for (const Tensor& x : xs) {
    forward.inputs.push_back(t.map(x, "an input"));
    const Shape &first = forward.inputs[0].shape, &shape = forward.inputs.back().shape;
    STD_TORCH_CHECK(shape.height == first.height && shape.width == first.width, kName, ": an input is ", shape.height,
                    "x", shape.width, ", must be ", first.height, "x", first.width);
    channels += shape.channels;
  }
  forward.weight = t.weight(weight, "weight", {-1, channels, 1, 1});
  const Shape out{forward.weight.sizes[0], forward.inputs[0].shape.height, forward.inputs[0].shape.width};
  forward.bias = t.bias(bias, "bias", out.channels);
  forward.activation = activation_of(kName, activation);
  forward.slope = static_cast<float>(slope);
  Map to_residual;
  if (residual.has_value()) {
    forward.residual = t.map(*residual, "residual", out).view;
    forward.mode = ResidualMode::kPre;
    to_residual = t.to_map(gradients[xs.size() + 2], "the gradient to residual", out);
  }
  const Map g = t.map(grad, "grad", out);
  std::vector<Map> to_xs;
  for (size_t i = 0; i < xs.size(); ++i) {
    to_xs.push_back(t.to_map(gradients[i], "the gradient to an input", forward.inputs[i].shape));
  }
  const WeightView to_weight = t.to_weight(gradients[xs.size()], "the gradient to weight", forward.weight);
  const WeightView to_bias = t.to_bias(gradients[xs.size() + 1], "the gradient to bias", out.channels);
  if (t.batch() == 0) return;
  Sequence::run(xs[0], t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    const bool linear = forward.activation == Activation::kNone;
    if (linear && to_residual.view.data != nullptr) s.copy(g.view, to_residual);
    const Map to_h = linear ? g : before_epilogue(s, forward, g, to_residual.view);
    int64_t first = 0;
    for (size_t i = 0; i < to_xs.size(); ++i) {
      Convolve part = forward;
      part.weight = input_channels(forward.weight, first, forward.inputs[i].shape.channels);
      first += forward.inputs[i].shape.channels;
      if (to_xs[i].view.data != nullptr) data_gradient(s, part, to_h, to_xs[i]);
    }
    s.weight_gradient(forward, to_h, to_weight, to_bias);
  });
}

// Through the dense weight that the two weights are the factors of.
void bsconv_backward(Tensor grad, Tensor x, Tensor pointwise, Tensor depthwise, std::optional<Tensor> bias,
                     std::optional<Tensor> residual, bool reflect, int64_t activation, double slope, int64_t precision,
                     std::vector<Tensor> gradients) {
  constexpr const char* kName = "bsconv_backward";
  Tensors t(kName, precision);
  t.check_count(gradients, residual.has_value() ? 5 : 4);
  Convolve forward;
  const Map in = t.map(x, "x");
  STD_TORCH_CHECK(!reflect || (in.shape.height > 1 && in.shape.width > 1), kName,
                  ": reflect padding needs 2 pixels a side, x is ", in.shape.height, "x", in.shape.width);
  forward.inputs = {in};
  forward.inner = t.weight(pointwise, "pointwise", {-1, in.shape.channels, 1, 1});
  const Shape out{forward.inner.sizes[0], in.shape.height, in.shape.width};
  forward.weight = t.weight(depthwise, "depthwise", {out.channels, 1, 3, 3});
  forward.composition = Composition::kDepthwise;
  forward.bias = t.bias(bias, "bias", out.channels);
  forward.padding = 1;
  forward.reflect = reflect;
  forward.activation = activation_of(kName, activation);
  forward.slope = static_cast<float>(slope);
  Map to_residual;
  if (residual.has_value()) {
    forward.residual = t.map(*residual, "residual", out).view;
    forward.mode = ResidualMode::kPre;
    to_residual = t.to_map(gradients[4], "the gradient to residual", out);
  }
  const Map g = t.map(grad, "grad", out);
  const Map to_x = t.to_map(gradients[0], "the gradient to x", in.shape);
  const WeightView to_pointwise = t.to_weight(gradients[1], "the gradient to pointwise", forward.inner);
  const WeightView to_depthwise = t.to_weight(gradients[2], "the gradient to depthwise", forward.weight);
  const WeightView to_bias = t.to_bias(gradients[3], "the gradient to bias", out.channels);
  if (t.batch() == 0) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) {
    const bool linear = forward.activation == Activation::kNone;
    if (linear && to_residual.view.data != nullptr) s.copy(g.view, to_residual);
    const Map to_h = linear ? g : before_epilogue(s, forward, g, to_residual.view);
    if (to_x.view.data != nullptr && !reflect) data_gradient(s, forward, to_h, to_x);
    if (to_x.view.data != nullptr && reflect) {
      // First to the padded map, which the convolution does not pad.
      Convolve valid = forward;
      valid.padding = 0;
      const Map padded = s.map({in.shape.channels, in.shape.height + 2, in.shape.width + 2});
      data_gradient(s, valid, to_h, padded);
      s.launch([&](device::Stream stream, bool overlap) {
        UnpadArgs a = {};
        a.padded = padded.view;
        a.output = to_x.view;
        a.height = static_cast<int32_t>(in.shape.height);
        a.width = static_cast<int32_t>(in.shape.width);
        a.channels = static_cast<int32_t>(in.shape.channels);
        launch_unpad(a, s.precision(), s.batch(), stream, overlap);
      });
    }
    const bool factors = to_pointwise.data != nullptr || to_depthwise.data != nullptr;
    WeightView product;
    if (factors) {
      product.dimensions = 4;
      const int64_t c = in.shape.channels;
      product.data = s.take(out.channels * c * 9 * 4);
      product.sizes[0] = static_cast<int32_t>(out.channels);
      product.sizes[1] = static_cast<int32_t>(c);
      product.sizes[2] = product.sizes[3] = 3;
      product.strides[0] = c * 9;
      product.strides[1] = 9;
      product.strides[2] = 3;
      product.strides[3] = 1;
    }
    s.weight_gradient(forward, to_h, product, to_bias);
    if (!factors) return;
    s.launch([&](device::Stream stream, bool overlap) {
      FactorsArgs a = {};
      a.product = reinterpret_cast<const float*>(product.data);
      a.pointwise = forward.inner;
      a.depthwise = forward.weight;
      a.to_pointwise = to_pointwise;
      a.to_depthwise = to_depthwise;
      a.channels = static_cast<int32_t>(in.shape.channels);
      launch_factors(a, out.channels, stream, overlap);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ESR_LIBRARY, m) {
  m.def(
      "conv3x3_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "float negative_slope, int residual_mode, int precision, Tensor(a!)[] gradients) -> ()");
  m.def(
      "spab_backward(Tensor grad, Tensor? grad_mid, Tensor x, Tensor[] weights, Tensor[] biases, int precision, "
      "Tensor(a!)[] gradients) -> ()");
  m.def(
      "conv3x3_pixel_shuffle_backward(Tensor grad, Tensor x, Tensor weight, int upscale_factor, int precision, "
      "Tensor(a!)[] gradients) -> ()");
  m.def(
      "conv1x1_backward(Tensor grad, Tensor[] xs, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "float negative_slope, int precision, Tensor(a!)[] gradients) -> ()");
  m.def(
      "bsconv_backward(Tensor grad, Tensor x, Tensor pointwise, Tensor depthwise, Tensor? bias, Tensor? residual, "
      "bool reflect, int activation, float negative_slope, int precision, Tensor(a!)[] gradients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ESR_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
  m.impl("spab_backward", TORCH_BOX(&spab_backward));
  m.impl("conv3x3_pixel_shuffle_backward", TORCH_BOX(&conv3x3_pixel_shuffle_backward));
  m.impl("conv1x1_backward", TORCH_BOX(&conv1x1_backward));
  m.impl("bsconv_backward", TORCH_BOX(&bsconv_backward));
}

}  // namespace esr::cuda
