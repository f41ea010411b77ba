// The gradients of ESA: its maps computed again one by one, then the adjoint of each step in reverse.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "adjoint.h"
#include "backward.h"
#include "library.h"

namespace esr::cuda {
namespace {

using torch::stable::Tensor;

// A convolution and where the gradients to its weight and bias go.
struct Part {
  Convolve forward;
  WeightView to_weight, to_bias;
  bool exists() const { return forward.weight.data != nullptr; }
};

// In the order of the operator's arguments.
enum { k1, k2, k3, k4, kF, kMax, k3Again, kParts };

struct Esa {
  Part parts[kParts];
  Map x, grad, to_x;
  int64_t hidden = 0;

  void run(Sequence& s) const;
};

void set_sizes(const Map& m, int32_t& height, int32_t& width) {
  height = static_cast<int32_t>(m.shape.height);
  width = static_cast<int32_t>(m.shape.width);
}

Map apply(Sequence& s, Convolve& c, const std::vector<Map>& inputs, const Shape& result) {
  c.inputs = inputs;
  c.output = s.map(result);
  s.convolve(c);
  return c.output;
}

void Esa::run(Sequence& s) const {
  Part p[kParts];
  std::copy(parts, parts + kParts, p);
  const auto channels = static_cast<int32_t>(hidden);
  const Shape full{hidden, x.shape.height, x.shape.width};
  const Shape reduced{hidden, (full.height - 3) / 2 + 1, (full.width - 3) / 2 + 1};
  const Shape pooled_shape{hidden, (reduced.height - kPoolWindow) / kPoolStep + 1,
                           (reduced.width - kPoolWindow) / kPoolStep + 1};
  const auto with = [&](auto args, auto launch_function) {
    args.channels = channels;
    s.launch(
        [&](device::Stream stream, bool overlap) { launch_function(args, s.precision(), s.batch(), stream, overlap); });
  };

  // Forward.
  const Map c1 = apply(s, p[k1].forward, {x}, full);
  const Map c2 = apply(s, p[k2].forward, {c1}, reduced);
  const Map pooled = s.map(pooled_shape);
  unsigned char* const index = s.take(s.batch() * pooled_shape.height * pooled_shape.width * round_up(hidden, 8));
  PoolArgs pool = {};
  pool.in = c2.view;
  pool.out = pooled.view;
  pool.index = index;
  set_sizes(pooled, pool.height, pool.width);
  with(pool, launch_pool);
  std::vector<Part*> low_parts = {&p[k3]};
  if (p[kMax].exists()) low_parts = {&p[kMax], &p[k3], &p[k3Again]};
  Map low = pooled;
  for (Part* part : low_parts) {
    part->forward.activation = part == low_parts.back() ? Activation::kNone : Activation::kRelu;
    low = apply(s, part->forward, {low}, pooled_shape);
  }
  const Map skip = p[kF].exists() ? apply(s, p[kF].forward, {c1}, full) : c1;
  const Map sums = p[kF].exists() ? skip : s.map(full);
  ResizeArgs resize = {};
  resize.low = low.view;
  resize.skip = skip.view;
  resize.output = sums.view;
  set_sizes(low, resize.low_height, resize.low_width);
  set_sizes(sums, resize.height, resize.width);
  with(resize, launch_resize);

  // The gate.
  p[k4].forward.inputs = {sums};
  p[k4].forward.residual = x.view;
  p[k4].forward.mode = ResidualMode::kGate;
  const Map direct = s.map(x.shape);
  const Map to_gate = before_epilogue(s, p[k4].forward, grad, direct.view);
  s.weight_gradient(p[k4].forward, to_gate, p[k4].to_weight, p[k4].to_bias);
  const Map to_sums = s.map(full);
  data_gradient(s, p[k4].forward, to_gate, to_sums);

  // The skip.
  Map to_c1 = to_sums;
  if (p[kF].exists()) {
    s.weight_gradient(p[kF].forward, to_sums, p[kF].to_weight, p[kF].to_bias);
    to_c1 = s.map(full);
    data_gradient(s, p[kF].forward, to_sums, to_c1);
  }

  // The low-resolution branch.
  Map to_low = s.map(pooled_shape);
  const Shape between{hidden, full.height, pooled_shape.width};
  ResizeAdjoint resized = {};
  resized.from = to_sums.view;
  resized.between =
      blocked_view(s.take(blocked_bytes(Precision::kTf32, between, s.batch())), Precision::kTf32, between);
  resized.to = to_low.view;
  set_sizes(to_sums, resized.height, resized.width);
  set_sizes(to_low, resized.low_height, resized.low_width);
  with(resized, launch_resize_adjoint);
  for (auto part = low_parts.rbegin(); part != low_parts.rend(); ++part) {
    const Convolve& forward = (*part)->forward;
    s.weight_gradient(forward, to_low, (*part)->to_weight, (*part)->to_bias);
    Convolve chain;
    if (*part != low_parts.front()) {  // its input is a ReLU's result, positive where the ReLU's input was
      chain.pass = Pass::kChain;
      chain.activation = Activation::kRelu;
      chain.given = forward.inputs[0].view;
    }
    const Map to_input = s.map(pooled_shape);
    data_gradient(s, forward, to_low, to_input, chain);
    to_low = to_input;
  }
  const Map stuffed = s.map({hidden, 2 * reduced.height - 1, 2 * reduced.width - 1});
  PoolAdjointArgs unpool = {};
  unpool.from = to_low.view;
  unpool.to = stuffed.view;
  unpool.index = index;
  set_sizes(to_low, unpool.pooled_height, unpool.pooled_width);
  set_sizes(stuffed, unpool.height, unpool.width);
  with(unpool, launch_pool_adjoint);
  Map to_c2 = stuffed;
  to_c2.shape = reduced;
  to_c2.view.row *= 2;
  to_c2.view.pixel *= 2;
  s.weight_gradient(p[k2].forward, to_c2, p[k2].to_weight, p[k2].to_bias);

  // The first convolution, read by both.
  const Map total = s.map(full);
  Convolve both;
  both.residual = to_c1.view;
  both.mode = ResidualMode::kPost;
  data_gradient(s, p[k2].forward, stuffed, total, both);
  s.weight_gradient(p[k1].forward, total, p[k1].to_weight, p[k1].to_bias);
  if (to_x.view.data == nullptr) return;
  Convolve sum;
  sum.residual = direct.view;
  sum.mode = ResidualMode::kPost;
  data_gradient(s, p[k1].forward, total, to_x, sum);
}

// `weights` are the operator's fourteen, empty where there is none.
void esa_backward(Tensor grad, Tensor x, std::vector<Tensor> weights, int64_t precision,
                  std::vector<Tensor> gradients) {
  constexpr const char* kName = "esa_backward";
  Tensors t(kName, precision);
  STD_TORCH_CHECK(weights.size() == 2 * kParts, kName, ": ", weights.size(), " weights given, must be ", 2 * kParts);
  t.check_count(gradients, 1 + 2 * kParts);
  Esa esa;
  esa.x = t.map(x, "x");
  esa.grad = t.map(grad, "grad", esa.x.shape);
  esa.to_x = t.to_map(gradients[0], "the gradient to x", esa.x.shape);
  const int64_t channels = esa.x.shape.channels;
  constexpr int kSmallest = 2 * kPoolWindow + 1;
  STD_TORCH_CHECK(esa.x.shape.height >= kSmallest && esa.x.shape.width >= kSmallest, kName, ": x is ",
                  esa.x.shape.height, "x", esa.x.shape.width, ", must be at least ", kSmallest, "x", kSmallest);
  for (int i = 0; i < kParts; ++i) {
    Part& p = esa.parts[i];
    const Tensor &weight = weights[2 * i], &bias = weights[2 * i + 1];
    if (weight.numel() == 0) {
      STD_TORCH_CHECK(i >= kF, kName, ": weight ", i, " is missing");
      continue;
    }
    const int64_t size = i == k1 || i == k4 || i == kF ? 1 : 3;
    const int64_t out = i == k4 ? channels : (i == k1 ? -1 : esa.hidden), in = i == k1 ? channels : esa.hidden;
    p.forward.weight = t.weight(weight, "a weight", {out, in, size, size});
    if (i == k1) esa.hidden = p.forward.weight.sizes[0];
    if (bias.numel() > 0) p.forward.bias = t.weight(bias, "a bias", {p.forward.weight.sizes[0]});
    p.forward.padding = size == 3 && i != k2 ? 1 : 0;
    p.forward.stride = i == k2 ? 2 : 1;
    p.to_weight = t.to_weight(gradients[1 + 2 * i], "a weight's gradient", p.forward.weight);
    p.to_bias = t.to_bias(gradients[2 + 2 * i], "a bias' gradient", p.forward.weight.sizes[0]);
  }
  STD_TORCH_CHECK(esa.parts[kMax].exists() == esa.parts[k3Again].exists(), kName, ": one of w_max and w3_ is missing");
  if (t.batch() == 0) return;
  Sequence::run(x, t.precision(), t.batch(), t.memory(), [&](Sequence& s) { esa.run(s); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ESR_LIBRARY, m) {
  m.def("esa_backward(Tensor grad, Tensor x, Tensor[] weights, int precision, Tensor(a!)[] gradients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ESR_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("esa_backward", TORCH_BOX(&esa_backward));
}

}  // namespace esr::cuda
