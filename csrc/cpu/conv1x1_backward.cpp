#include "conv1x1_backward.h"

#include "backward.h"
#include "capability.h"
#include "planar.h"

namespace esr {
namespace {

constexpr int64_t kStripPixels = 384, kMostStrips = 16;

}  // namespace

using torch::stable::Tensor;

void conv1x1_backward(const Tensor& grad, const std::vector<Tensor>& xs, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation,
                      double slope, const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "conv1x1_backward";
  const Kernels& kernels = active_kernels();
  const size_t inputs = xs.size();
  STD_TORCH_CHECK(inputs >= 1 && inputs <= static_cast<size_t>(Conv1x1Args::kMaxInputs), kName, ": ", inputs,
                  " inputs given, allowed are 1..", Conv1x1Args::kMaxInputs);
  const size_t to_weight = inputs, to_bias = inputs + 1, to_residual = inputs + 2;
  Gradients t(kName, gradients, inputs + (residual.has_value() ? 3 : 2));
  DerivativeArgs epilogue = t.epilogue(activation, slope);
  if (residual.has_value()) epilogue.mode = ResidualMode::kPre;
  const bool again = epilogue.activation != Activation::kNone;
  const bool returns_residual = residual.has_value() && t.wants(to_residual);

  std::vector<Batch> in, to_x;
  int64_t channels = 0;
  bool any = t.wants(to_weight) || t.wants(to_bias) || returns_residual;
  for (size_t i = 0; i < inputs; ++i) {
    in.push_back(t.read(xs[i], "an input"));
    const Shape &first = in[0].shape, &shape = in[i].shape;
    STD_TORCH_CHECK(shape.height == first.height && shape.width == first.width, kName, ": an input is ", shape.height,
                    "x", shape.width, ", must be ", first.height, "x", first.width);
    to_x.push_back(t.target(i, "the gradient to an input", shape));
    channels += shape.channels;
    any = any || t.wants(i);
  }
  const int64_t height = in[0].shape.height, width = in[0].shape.width;
  const Weight w = t.weight(weight, "weight", {-1, channels, 1, 1});
  const int64_t cout = w.shape[0];
  const std::vector<float> b = t.bias(bias, "bias", cout);
  const Shape out{cout, height, width};
  const Batch g = t.read(grad, "grad", out);
  const Batch r = residual.has_value() ? t.read(*residual, "residual", out) : Batch{};
  const Batch to_r = returns_residual ? t.target(to_residual, "the gradient to residual", out) : Batch{};
  if (!any) return;

  bool planar = in_planes(g) && (!residual.has_value() || in_planes(r)) && (!returns_residual || in_planes(to_r));
  for (size_t i = 0; i < inputs; ++i) planar = planar && in_planes(in[i]) && (!t.wants(i) || in_planes(to_x[i]));
  if (planar) {
    const PlanarGradients found =
        planar_gradients(kernels, w, b, epilogue, in, r, g, to_x, to_r, t.wants(to_weight), t.wants(to_bias));
    if (t.wants(to_weight)) t.write(to_weight, "the gradient to weight", found.weight);
    if (t.wants(to_bias)) t.write(to_bias, "the gradient to bias", found.bias);
    return;
  }

  // Strips that stay in the second-level cache: cut by the size of the images alone, as the sums depend on them.
  const int64_t rows = std::max({ceil_div(height, kMostStrips), std::min(height, kStripPixels / width), int64_t{1}});
  const int64_t strips = ceil_div(height, rows);
  bool flat = one_row(g.image(0), width) && (!residual.has_value() || one_row(r.image(0), width)) &&
              (!returns_residual || one_row(to_r.image(0), width));
  for (size_t i = 0; i < inputs; ++i) {
    flat = flat && one_row(in[i].image(0), width) && (!t.wants(i) || one_row(to_x[i].image(0), width));
  }

  const Dense1x1 forward = again ? Dense1x1(w, data_or_null(b), kernels) : Dense1x1();
  const Weight transposed = adjoint(w);
  std::vector<Dense1x1> backward(inputs);
  std::vector<WeightSums> sums;
  int64_t first = 0;
  for (size_t i = 0; i < inputs; ++i) {
    const int64_t cin = in[i].shape.channels;
    if (t.wants(i)) backward[i] = Dense1x1(slice(transposed, first, cin), nullptr, kernels);
    sums.emplace_back(kernels, WeightSums::Filter{1, 1, false}, cin, cout, t.images() * strips, t.wants(to_weight),
                      i == 0 && t.wants(to_bias));
    first += cin;
  }

  const auto strip = [&](int64_t k) {
    const int64_t n = k / strips, y = k % strips * rows, lines = std::min(rows, height - y);
    const int64_t count = flat ? 1 : lines, length = flat ? lines * width : width;
    std::vector<MapLayout> layouts;
    for (const Batch& b : in) layouts.push_back(layout_for(kernels, {b.shape.channels, count, length}));
    layouts.push_back(layout_for(kernels, {cout, count, length}));
    const Maps maps(layouts);
    std::vector<Map> images;
    for (size_t i = 0; i < inputs; ++i) {
      images.push_back(maps[i]);
      if (again || t.wants(to_weight)) {
        import_strip(kernels, rows_from(in[i].image(n), y), layouts[i], maps[i].pixels(), 0, count);
      }
    }
    const Map& to_h = maps[inputs];
    import_strip(kernels, rows_from(g.image(n), y), to_h.layout, to_h.pixels(), 0, count);
    if (again) {
      MapLayout dense = to_h.layout;
      dense.pitch = length * dense.step;
      const int64_t floats = count * dense.pitch;
      const Workspace memory((residual.has_value() ? 2 : 1) * floats);
      float* const h = memory.data();
      DerivativeArgs strip_epilogue = epilogue;
      forward.convolve(images, {}, h, dense.pitch, 0, count);
      if (residual.has_value()) {
        import_strip(kernels, rows_from(r.image(n), y), dense, h + floats, 0, count);
        strip_epilogue.residual = h + floats;
      }
      differentiate_rows(kernels, strip_epilogue, h, to_h, 0, count);
      count_pass(Pass::kAgain);
    }
    if (returns_residual) {
      export_rows(kernels, {rows_from(to_r.image(n), y)}, to_h.layout, to_h.pixels(), 0, 0, count);
    }
    for (size_t i = 0; i < inputs; ++i) {
      sums[i].add(k, images[i], images[i].pixels(), to_h);
      if (t.wants(i)) {
        const TensorView to = rows_from(to_x[i].image(n), y);
        export_data_gradient(kernels, backward[i], to_h, {}, to, in[i].shape.channels);
      }
    }
  };
  parallel_ranges(t.images() * strips, rows * width * cout * channels * 3, [&](int64_t k0, int64_t k1) {
    for (int64_t k = k0; k < k1; ++k) strip(k);
  });

  if (t.wants(to_bias)) t.write(to_bias, "the gradient to bias", sums[0].bias());
  if (!t.wants(to_weight)) return;
  std::vector<float> values(w.values.size());
  first = 0;
  for (size_t i = 0; i < inputs; ++i) {
    const int64_t cin = in[i].shape.channels;
    const std::vector<float> part = sums[i].weight();
    for (int64_t o = 0; o < cout; ++o) {
      std::copy(part.begin() + o * cin, part.begin() + (o + 1) * cin, values.begin() + o * channels + first);
    }
    first += cin;
  }
  t.write(to_weight, "the gradient to weight", values);
}

}  // namespace esr
