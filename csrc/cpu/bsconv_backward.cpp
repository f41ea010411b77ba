#include "bsconv_backward.h"

#include <cstring>

#include "backward.h"
#include "capability.h"

namespace esr {
namespace {

using torch::stable::Tensor;

void copy_pixel(float* to, const float* from, int64_t step) {
  std::memcpy(to, from, static_cast<size_t>(step) * sizeof(float));
}

// The ring as reflect padding wants it.
void reflect_ring(const Map& map) {
  const MapLayout& m = map.layout;
  for (int64_t y = 0; y < m.height; ++y) {
    float* row = map.ring + (y + 1) * m.pitch;
    copy_pixel(row, row + 2 * m.step, m.step);
    copy_pixel(row + (m.width + 1) * m.step, row + (m.width - 1) * m.step, m.step);
  }
  const size_t bytes = static_cast<size_t>(m.pitch) * sizeof(float);
  std::memcpy(map.ring, map.ring + 2 * m.pitch, bytes);
  std::memcpy(map.ring + (m.height + 1) * m.pitch, map.ring + (m.height - 1) * m.pitch, bytes);
}

// The other way: adds what the ring holds to the pixels that it repeats.
void fold_ring(const Kernels& kernels, const Map& map) {
  const MapLayout& m = map.layout;
  for (int64_t y = 0; y < m.height + 2; ++y) {
    float* row = map.ring + y * m.pitch;
    kernels.add_to(row + 2 * m.step, row, m.step);
    kernels.add_to(row + (m.width - 1) * m.step, row + (m.width + 1) * m.step, m.step);
  }
  kernels.add_to(map.ring + 2 * m.pitch, map.ring, m.pitch);
  kernels.add_to(map.ring + (m.height - 1) * m.pitch, map.ring + (m.height + 1) * m.pitch, m.pitch);
}

}  // namespace

void bsconv_backward(const Tensor& grad, const Tensor& x, const Tensor& pointwise, const Tensor& depthwise,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool reflect,
                     int64_t activation, double slope, const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "bsconv_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, residual.has_value() ? 5 : 4);
  DerivativeArgs epilogue = t.epilogue(activation, slope);
  if (residual.has_value()) epilogue.mode = ResidualMode::kPre;
  const bool again = epilogue.activation != Activation::kNone;
  const bool returns_residual = residual.has_value() && t.wants(4);
  const Batch in = t.read(x, "x");
  const int64_t height = in.shape.height, width = in.shape.width;
  STD_TORCH_CHECK(!reflect || (height >= 2 && width >= 2), kName, ": x is ", height, "x", width,
                  ", reflect padding needs 2 pixels a side");
  const Weight p = t.weight(pointwise, "pointwise", {-1, in.shape.channels, 1, 1});
  const int64_t channels = p.shape[0];
  const Weight d = t.weight(depthwise, "depthwise", {channels, 1, 3, 3});
  const std::vector<float> b = t.bias(bias, "bias", channels);
  const Shape out{channels, height, width};
  const Batch g = t.read(grad, "grad", out);
  const Batch r = residual.has_value() ? t.read(*residual, "residual", out) : Batch{};
  const Batch to_x = t.target(0, "the gradient to x", in.shape);
  const Batch to_r = returns_residual ? t.target(4, "the gradient to residual", out) : Batch{};
  const bool data = t.wants(0) || t.wants(1);
  if (!data && !t.wants(2) && !t.wants(3) && !returns_residual) return;
  const bool needs_inner = again || t.wants(2);

  const Dense1x1 forward = needs_inner ? Dense1x1(p, nullptr, kernels) : Dense1x1();
  const Dense1x1 backward = t.wants(0) ? Dense1x1(adjoint(p), nullptr, kernels) : Dense1x1();
  const PackedFloats filter = pack_depthwise(d, kernels.lanes),
                     packed_bias = pack_vector(data_or_null(b), channels, kernels.lanes);
  const PackedFloats no_bias = pack_vector(nullptr, channels, kernels.lanes);
  Weight turned = d;
  for (int64_t c = 0; c < channels; ++c) std::reverse(turned.values.begin() + c * 9, turned.values.begin() + c * 9 + 9);
  const PackedFloats turned_filter = pack_depthwise(turned, kernels.lanes);
  WeightSums pointwise_sums(kernels, {1, 1, false}, in.shape.channels, channels, t.images(), t.wants(1), false);
  WeightSums depthwise_sums(kernels, {3, 1, false, true}, 1, channels, t.images(), t.wants(2), t.wants(3));
  // With reflect padding the inner map's gradient has a ring, for which the gradient needs two rings of zeros.
  const int64_t ring = reflect ? 1 : 0;
  const MapLayout wide = layout_for(kernels, {channels, height + 2 * ring, width + 2 * ring});
  const MapLayout layout = layout_for(kernels, out);

  for_images(t.images(), [&](int64_t n) {
    const Maps maps({layout_for(kernels, in.shape), layout, layout, wide});
    const Map &image = maps[0], &inner = maps[1], &to_inner = maps[2];
    const int64_t step = layout.step, dense = width * step;
    if (needs_inner || t.wants(1)) import_map(kernels, in.image(n), image);
    if (needs_inner) {
      for_strips(height, forward.row_cost(width), [&](int64_t y0, int64_t y1) {
        forward.convolve({image}, {}, inner.pixels() + y0 * layout.pitch, layout.pitch, y0, y1);
        if (!reflect) zero_ring(inner, y0, y1);
      });
      if (reflect) reflect_ring(inner);
      count_pass(Pass::kAgain);
    }
    Map to_h = maps[3];
    if (reflect) {
      std::memset(to_h.ring, 0, static_cast<size_t>(wide.floats()) * sizeof(float));
      to_h.ring = maps[3].pixels();
      to_h.layout = layout;
      to_h.layout.pitch = wide.pitch;
    }
    const MapLayout& h_layout = to_h.layout;
    parallel_ranges(height, dense * 16, [&](int64_t y0, int64_t y1) {
      const Workspace memory(2 * dense);
      float *const h = memory.data(), *const row_residual = h + dense;
      MapLayout row_layout = layout;
      row_layout.pitch = dense;
      import_strip(kernels, g.image(n), h_layout, to_h.pixels() + y0 * h_layout.pitch, y0, y1);
      if (!reflect) zero_ring(to_h, y0, y1);
      for (int64_t y = y0; again && y < y1; ++y) {
        DepthwiseArgs a;
        for (int64_t k = 0; k < 3; ++k) a.rows[k] = inner.ring + (y + k) * layout.pitch;
        a.step = step;
        a.width = width;
        a.weights = filter.data();
        a.bias = packed_bias.data();
        a.out = h;
        kernels.depthwise(a, y);
        DerivativeArgs row_epilogue = epilogue;
        if (residual.has_value()) {
          import_strip(kernels, r.image(n), row_layout, row_residual, y, y + 1);
          row_epilogue.residual = row_residual;
        }
        differentiate_rows(kernels, row_epilogue, h, to_h, y, y + 1);
      }
      if (returns_residual) export_rows(kernels, {to_r.image(n)}, h_layout, to_h.pixels(), 0, y0, y1);
    });
    if (again) count_pass(Pass::kAgain);
    depthwise_sums.add(n, inner, inner.ring, to_h);
    if (!data) return;
    parallel_ranges(height + 2 * ring, dense * 9, [&](int64_t y0, int64_t y1) {
      for (int64_t y = y0; y < y1; ++y) {
        DepthwiseArgs a;
        for (int64_t k = 0; k < 3; ++k) a.rows[k] = maps[3].ring + (y + k) * wide.pitch;
        a.step = step;
        a.width = wide.width;
        a.weights = turned_filter.data();
        a.bias = no_bias.data();
        a.out = reflect ? to_inner.ring + y * layout.pitch : to_inner.pixels() + y * layout.pitch;
        kernels.depthwise(a, y);
      }
    });
    if (reflect) fold_ring(kernels, to_inner);
    count_pass(Pass::kData);
    pointwise_sums.add(n, image, image.pixels(), to_inner);
    if (t.wants(0)) export_data_gradient(kernels, backward, to_inner, {}, to_x.image(n), in.shape.channels);
  });
  if (t.wants(1)) t.write(1, "the gradient to pointwise", pointwise_sums.weight());
  if (t.wants(2)) t.write(2, "the gradient to depthwise", depthwise_sums.weight());
  if (t.wants(3)) t.write(3, "the gradient to bias", depthwise_sums.bias());
}

}  // namespace esr
