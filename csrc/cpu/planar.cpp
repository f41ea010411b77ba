#include "planar.h"

#include <algorithm>
#include <cstring>

#include "backward.h"

namespace esr {
namespace {

// Of gradients: pixels of a tile, and the least tiles and the most parts of an image that are summed up on their own.
constexpr int64_t kTile = 128, kLeastTiles = 8, kMostParts = 16;

float* plane(const TensorView& image, int64_t channel) {
  return static_cast<float*>(image.data) + channel * image.channel_stride;
}

// Channels of an image as rows of kTile floats, zeros behind the last pixel.
void copy_tile(const TensorView& image, int64_t channels, int64_t pixel, int64_t pixels, float* to) {
  for (int64_t c = 0; c < channels; ++c, to += kTile) {
    std::memcpy(to, plane(image, c) + pixel, static_cast<size_t>(pixels) * sizeof(float));
    std::fill(to + pixels, to + kTile, 0.0f);
  }
}

// The sums of the lanes of `count` vectors, added to `to`.
void add_lanes(const float* vectors, int64_t count, int64_t lanes, float* to) {
  for (int64_t i = 0; i < count; ++i, vectors += lanes) {
    float sum = 0.0f;
    for (int64_t k = 0; k < lanes; ++k) sum += vectors[k];
    to[i] += sum;
  }
}

}  // namespace

bool in_planes(const Batch& b) {
  const TensorView& v = b.first;
  const Shape& s = b.shape;
  return v.dtype == Dtype::kFloat32 && b.can_be(true) && (v.row_stride == s.width || s.height == 1);
}

std::unique_ptr<PlanarPlan> PlanarPlan::make(const Program& program, const Weights& weights, const Kernels& kernels) {
  const auto& layers = program.layers;
  if (layers.size() != 1 || layers[0].op != Op::kConv1x1 || program.outputs.size() != 1) return nullptr;
  const Weight& w = weight_of(layers[0], 0, weights, "weight", {-1, -1, 1, 1});
  if (w.shape[1] > Planar1x1Args::kMostChannels) return nullptr;
  return std::unique_ptr<PlanarPlan>(new PlanarPlan(program, weights, kernels));
}

PlanarPlan::PlanarPlan(const Program& program, const Weights& weights, const Kernels& kernels)
    : kernels_(kernels), layer_(program.layers[0]) {
  const Weight& w = weight_of(layer_, 0, weights, "weight", {-1, -1, 1, 1});
  cout_ = w.shape[0];
  cin_ = w.shape[1];
  weights_ = pack_rows(w, kernels.planar_rows);
  bias_ = bias_of(layer_, 1, weights, "bias", cout_, kernels.lanes);
}

bool PlanarPlan::takes(const std::vector<Batch>& in, const std::vector<Batch>& out) const {
  const int64_t plane = out[0].shape.height * out[0].shape.width;
  const auto dense = [&](const Batch& b) {
    return in_planes(b) && (b.first.channel_stride == plane || b.shape.channels == 1);
  };
  return dense(out[0]) && (!layer_.has_residual || dense(in[static_cast<size_t>(layer_.inputs.back())])) &&
         std::all_of(layer_.inputs.begin(), layer_.inputs.end(),
                     [&](int64_t v) { return in_planes(in[static_cast<size_t>(v)]); });
}

void PlanarPlan::run(const std::vector<Batch>& in, const std::vector<Batch>& out, int64_t n) const {
  Planar1x1Args a;
  for (size_t i = 0; i < layer_.operands(); ++i) {
    const Batch& b = in[static_cast<size_t>(layer_.inputs[i])];
    const TensorView image = b.image(n);
    for (int64_t c = 0; c < b.shape.channels; ++c) a.in[a.cin++] = plane(image, c);
  }
  a.out = static_cast<float*>(out[0].image(n).data);
  a.cout = cout_;
  a.pixels = a.plane = out[0].shape.height * out[0].shape.width;
  a.mode = layer_.residual_mode;
  if (layer_.has_residual) {
    a.residual = static_cast<const float*>(in[static_cast<size_t>(layer_.inputs.back())].image(n).data);
  }
  a.weights = weights_.data();
  a.bias = bias_.data();
  a.activation = layer_.activation;
  a.slope = layer_.slope;
  parallel_ranges(ceil_div(a.pixels, Planar1x1Args::kTile), Planar1x1Args::kTile * cin_ * cout_,
                  [&](int64_t first, int64_t last) { kernels_.planar1x1(a, first, last); });
}

PlanarGradients planar_gradients(const Kernels& kernels, const Weight& w, const std::vector<float>& bias,
                                 const DerivativeArgs& epilogue, const std::vector<Batch>& xs, const Batch& residual,
                                 const Batch& grad, const std::vector<Batch>& to_x, const Batch& to_residual,
                                 bool to_weight, bool to_bias) {
  const int64_t cout = w.shape[0], cin = w.shape[1], lanes = kernels.lanes;
  const bool again = epilogue.activation != Activation::kNone;
  const int64_t plane_pixels = grad.shape.height * grad.shape.width, tiles = ceil_div(plane_pixels, kTile);
  const int64_t tiles_each = std::max(ceil_div(tiles, kMostParts), std::min(tiles, kLeastTiles));
  const int64_t parts = ceil_div(tiles, tiles_each);
  const int64_t weights = to_weight ? cout * cin : 0, floats = weights + (to_bias ? cout : 0);

  // h before the activation, from the inputs' tile to one of its own.
  Planar1x1Args forward;
  const PackedFloats forward_weights = again ? pack_rows(w, kernels.planar_rows) : PackedFloats();
  const PackedFloats forward_bias = pack_vector(data_or_null(bias), cout, lanes);
  forward.cin = cin;
  forward.cout = cout;
  forward.plane = kTile;
  forward.weights = forward_weights.data();
  forward.bias = forward_bias.data();

  // From the gradient's tile to the inputs' planes.
  const Weight transposed = adjoint(w);
  const PackedFloats zeros(cin);
  std::vector<PackedFloats> adjoint_weights(xs.size());
  std::vector<Planar1x1Args> adjoints(xs.size());
  int64_t channel = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t channels = xs[i].shape.channels;
    if (to_x[i].first.data != nullptr) {
      adjoint_weights[i] = pack_rows(slice(transposed, channel, channels), kernels.planar_rows);
      adjoints[i].cin = cout;
      adjoints[i].cout = channels;
      adjoints[i].plane = to_x[i].first.channel_stride;
      adjoints[i].weights = adjoint_weights[i].data();
      adjoints[i].bias = zeros.data();
    }
    channel += channels;
  }

  PackedFloats sums(grad.images * parts * floats);
  const auto part = [&](int64_t k, float* tile, float* vectors) {
    const int64_t n = k / parts, first = k % parts * tiles_each, last = std::min(first + tiles_each, tiles);
    float *const g = tile + cin * kTile, *const h = g + cout * kTile, *const skip = h + cout * kTile;
    std::fill(vectors, vectors + floats * lanes, 0.0f);
    PlanarProductsArgs products;
    products.x = tile;
    products.cin = to_weight ? cin : 0;
    products.g = g;
    products.cout = cout;
    products.stride = kTile;
    products.sums = vectors;
    products.totals = to_bias ? vectors + weights * lanes : nullptr;
    for (int64_t t = first; t < last; ++t) {
      const int64_t pixel = t * kTile, pixels = std::min(kTile, plane_pixels - pixel);
      if (again || to_weight) {
        float* to = tile;
        for (const Batch& x : xs) {
          copy_tile(x.image(n), x.shape.channels, pixel, pixels, to);
          to += x.shape.channels * kTile;
        }
      }
      copy_tile(grad.image(n), cout, pixel, pixels, g);
      if (again) {
        Planar1x1Args a = forward;
        a.out = h;
        kernels.planar1x1_tile(a, tile, kTile, 0, kTile);
        DerivativeArgs d = epilogue;
        d.h = h;
        d.grad = d.out = g;
        d.floats = cout * kTile;
        if (residual.first.data != nullptr) {
          copy_tile(residual.image(n), cout, pixel, pixels, skip);
          d.residual = skip;
        }
        kernels.derivative(d);
        // A derivative that is not finite would make the zeros behind the image NaN.
        for (int64_t c = 0; c < cout; ++c) std::fill(g + c * kTile + pixels, g + (c + 1) * kTile, 0.0f);
      }
      if (to_residual.first.data != nullptr) {
        for (int64_t c = 0; c < cout; ++c) {
          std::copy_n(g + c * kTile, pixels, plane(to_residual.image(n), c) + pixel);
        }
      }
      for (size_t i = 0; i < xs.size(); ++i) {
        if (adjoints[i].weights == nullptr) continue;
        Planar1x1Args a = adjoints[i];
        a.out = static_cast<float*>(to_x[i].image(n).data);
        kernels.planar1x1_tile(a, g, kTile, pixel, pixels);
      }
      products.pixels = round_up(pixels, lanes);
      if (floats > 0) kernels.planar1x1_products(products);
    }
    add_lanes(vectors, floats, lanes, sums.data() + k * floats);
    if (again) count_pass(Pass::kAgain);
    for (size_t i = 0; i < xs.size(); ++i) {
      if (adjoints[i].weights != nullptr) count_pass(Pass::kData);
      if (to_weight) count_pass(Pass::kWeight);
    }
  };
  parallel_ranges(grad.images * parts, tiles_each * kTile * cout * cin * 3, [&](int64_t k0, int64_t k1) {
    const Workspace tile((cin + 3 * cout) * kTile), vectors(floats * lanes);
    for (int64_t k = k0; k < k1; ++k) part(k, tile.data(), vectors.data());
  });

  PlanarGradients found;
  found.weight.assign(static_cast<size_t>(weights), 0.0f);
  found.bias.assign(static_cast<size_t>(floats - weights), 0.0f);
  for (int64_t k = 0; k < grad.images * parts; ++k) {
    const float* from = sums.data() + k * floats;
    for (float& to : found.weight) to += *from++;
    for (float& to : found.bias) to += *from++;
  }
  return found;
}

}  // namespace esr
