#include "planar.h"

#include <algorithm>

namespace esr {
namespace {

bool is_planar(const Batch& b) {
  const TensorView& v = b.first;
  const Shape& s = b.shape;
  return v.dtype == Dtype::kFloat32 && b.can_be(true) && (v.row_stride == s.width || s.height == 1);
}

}  // namespace

std::unique_ptr<PlanarPlan> PlanarPlan::make(const Program& program, const Weights& weights, const Kernels& kernels) {
  const auto& layers = program.layers;
  const bool alone = layers.size() == 1, added = layers.size() == 2 && layers[1].op == Op::kAdd;
  if (!(alone || added) || layers[0].op != Op::kConv1x1) return nullptr;
  if (program.outputs != std::vector<int64_t>{program.values() - 1}) return nullptr;
  if (layers[0].has_residual || weights[static_cast<size_t>(layers[0].weights[0])].shape.size() != 4) return nullptr;
  if (weights[static_cast<size_t>(layers[0].weights[0])].shape[1] > Planar1x1Args::kMostChannels) return nullptr;
  if (added) {
    const auto& summands = layers[1].inputs;
    const int64_t result = program.inputs;
    if ((summands[0] == result) == (summands[1] == result)) return nullptr;
  }
  return std::unique_ptr<PlanarPlan>(new PlanarPlan(program, weights, kernels));
}

PlanarPlan::PlanarPlan(const Program& program, const Weights& weights, const Kernels& kernels)
    : kernels_(kernels), layer_(program.layers[0]) {
  if (program.layers.size() == 2) {
    const auto& summands = program.layers[1].inputs;
    residual_ = summands[0] == program.inputs ? summands[1] : summands[0];
  }
  const Weight& w = weight_of(layer_, 0, weights, "weight", {-1, -1, 1, 1});
  cout_ = w.shape[0];
  cin_ = w.shape[1];
  weights_ = pack_rows(w, kernels.planar_rows);
  bias_ = bias_of(layer_, 1, weights, "bias", cout_, kernels.lanes);
}

bool PlanarPlan::takes(const std::vector<Batch>& in, const std::vector<Batch>& out) const {
  const int64_t plane = out[0].shape.height * out[0].shape.width;
  const auto dense = [&](const Batch& b) {
    return is_planar(b) && (b.first.channel_stride == plane || b.shape.channels == 1);
  };
  return dense(out[0]) && (residual_ < 0 || dense(in[static_cast<size_t>(residual_)])) &&
         std::all_of(layer_.inputs.begin(), layer_.inputs.end(),
                     [&](int64_t v) { return is_planar(in[static_cast<size_t>(v)]); });
}

void PlanarPlan::run(const std::vector<Batch>& in, const std::vector<Batch>& out, int64_t n) const {
  Planar1x1Args a;
  for (const int64_t v : layer_.inputs) {
    const Batch& b = in[static_cast<size_t>(v)];
    const TensorView image = b.image(n);
    for (int64_t c = 0; c < b.shape.channels; ++c) {
      a.in[a.cin++] = static_cast<const float*>(image.data) + c * image.channel_stride;
    }
  }
  a.out = static_cast<float*>(out[0].image(n).data);
  a.cout = cout_;
  a.pixels = a.plane = out[0].shape.height * out[0].shape.width;
  if (residual_ >= 0) a.residual = static_cast<const float*>(in[static_cast<size_t>(residual_)].image(n).data);
  a.weights = weights_.data();
  a.bias = bias_.data();
  a.activation = layer_.activation;
  a.slope = layer_.slope;
  parallel_ranges(ceil_div(a.pixels, Planar1x1Args::kTile), Planar1x1Args::kTile * cin_ * cout_,
                  [&](int64_t first, int64_t last) { kernels_.planar1x1(a, first, last); });
}

}  // namespace esr
