#include "conv3x3_backward.h"

#include "backward.h"
#include "capability.h"

namespace esr {
namespace {

using torch::stable::Tensor;

// One dense 3x3 convolution of an operator, with what its gradients need.
struct Convolution {
  Convolution(const Kernels& kernels, const Batch& in, const Weight& w, const std::vector<float>& bias, bool again,
              bool data, bool to_weight, bool to_bias)
      : sums(kernels, {3, 1, use_winograd(w.shape[1], w.shape[0])}, w.shape[1], w.shape[0], in.images, to_weight,
             to_bias) {
    if (again) forward = Dense3x3(w, data_or_null(bias), kernels);
    if (data) backward = Dense3x3(adjoint(w), nullptr, kernels);
  }

  Dense3x3 forward, backward;
  WeightSums sums;
};

void write_sums(const Gradients& t, const Convolution& c, size_t weight, size_t bias) {
  if (t.wants(weight)) t.write(weight, "the gradient to weight", c.sums.weight());
  if (t.wants(bias)) t.write(bias, "the gradient to bias", c.sums.bias());
}

}  // namespace

void conv3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, int64_t activation, double slope, int64_t residual_mode,
                      const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "conv3x3_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, 4);
  STD_TORCH_CHECK(residual_mode >= 0 && residual_mode < kPublicResidualModeCount, kName, ": residual_mode is ",
                  residual_mode, ", must be 0..", kPublicResidualModeCount - 1);
  DerivativeArgs epilogue = t.epilogue(activation, slope);
  if (residual.has_value()) epilogue.mode = static_cast<ResidualMode>(residual_mode);
  const bool attention = epilogue.mode == ResidualMode::kAttention;
  const bool reads_residual = attention || epilogue.mode == ResidualMode::kPre;
  const bool linear = epilogue.activation == Activation::kNone && !attention;

  const Batch in = t.read(x, "x");
  const Weight w = t.weight(weight, "weight", {-1, in.shape.channels, 3, 3});
  const Shape out{w.shape[0], in.shape.height, in.shape.width};
  const std::vector<float> b = t.bias(bias, "bias", out.channels);
  const Batch g = t.read(grad, "grad", out);
  const Batch r = residual.has_value() ? t.read(*residual, "residual", out) : Batch{};
  const Batch to_x = t.target(0, "the gradient to x", in.shape);
  Batch to_residual = t.target(3, "the gradient to residual", out);
  if (t.wants(3) && (linear || !reads_residual)) {
    t.copy(3, grad);
    to_residual = {};
  }
  const bool others = t.wants(0) || t.wants(1) || t.wants(2);
  if (!others && to_residual.images == 0) return;
  const bool again = !linear;
  Convolution c(kernels, in, w, b, again, t.wants(0), t.wants(1), t.wants(2));
  const MapLayout out_layout = layout_for(kernels, out);

  for_images(t.images(), [&](int64_t n) {
    const Maps maps({layout_for(kernels, in.shape), out_layout});
    const Map &image = maps[0], &to_h = maps[1];
    if (again || t.wants(1)) import_map(kernels, in.image(n), image);
    import_map(kernels, g.image(n), to_h);
    if (again) {
      MapLayout rows = out_layout;
      rows.pitch = rows.width * rows.step;
      const int64_t strip = Dense3x3::kStrip * rows.pitch;
      c.forward.for_strips(image.layout, 3 * rows.pitch, [&](int64_t y0, int64_t y1, float* memory, float* scratch) {
        float *h = memory, *res = h + strip, *to_res = res + strip;
        c.forward.convolve(image, {}, rows, h, y0, scratch, y0, y1);
        if (reads_residual) import_strip(kernels, r.image(n), rows, res, y0, y1);
        for (int64_t y = y0; y < y1; ++y) {
          const int64_t offset = (y - y0) * rows.pitch;
          DerivativeArgs a = epilogue;
          a.h = h + offset;
          a.residual = res + offset;
          a.grad = a.out = to_h.pixels() + y * to_h.layout.pitch;
          a.to_residual = attention && to_residual.images > 0 ? to_res + offset : nullptr;
          a.floats = rows.pitch;
          kernels.derivative(a);
        }
        if (to_residual.images == 0) return;
        if (attention) {
          export_rows(kernels, {to_residual.image(n)}, rows, to_res, y0, y0, y1);
        } else {
          export_rows(kernels, {to_residual.image(n)}, out_layout, to_h.pixels(), 0, y0, y1);
        }
      });
      count_pass(Pass::kAgain);
    }
    c.sums.add(n, image, image.ring, to_h);
    if (t.wants(0)) export_data_gradient(kernels, c.backward, to_h, {}, to_x.image(n));
  });
  write_sums(t, c, 1, 2);
}

void spab_backward(const Tensor& grad, const std::optional<Tensor>& grad_mid, const Tensor& x,
                   const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "spab_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, 7);
  STD_TORCH_CHECK(weights.size() == 3 && biases.size() == 3, kName, ": ", weights.size(), " weights and ",
                  biases.size(), " biases given, must be 3 of each");
  const Batch in = t.read(x, "x");
  // Whether the gradient to the input of convolution k is wanted, for anything before it.
  bool data[3];
  std::vector<Convolution> convolutions;
  convolutions.reserve(3);
  std::vector<MapLayout> layouts{layout_for(kernels, in.shape)};
  int64_t channels = in.shape.channels;
  for (size_t k = 0; k < 3; ++k) {
    const Weight w = t.weight(weights[k], "weight", {k < 2 ? -1 : in.shape.channels, channels, 3, 3});
    channels = w.shape[0];
    const std::vector<float> b =
        t.bias(biases[k].numel() == 0 ? std::nullopt : std::optional<Tensor>(biases[k]), "bias", channels);
    data[k] = k == 0 ? t.wants(0) : data[k - 1] || t.wants(2 * k - 1) || t.wants(2 * k);
    convolutions.emplace_back(kernels, in, w, b, true, data[k], t.wants(2 * k + 1), t.wants(2 * k + 2));
    const MapLayout m = layout_for(kernels, {channels, in.shape.height, in.shape.width});
    if (k < 2) layouts.insert(layouts.end(), {m, m});
  }
  const Shape mid{convolutions[0].forward.cout(), in.shape.height, in.shape.width};
  const Batch g = t.read(grad, "grad", in.shape);
  const Batch g_mid = grad_mid.has_value() ? t.read(*grad_mid, "grad_mid", mid) : Batch{};
  const Batch to_x = t.target(0, "the gradient to x", in.shape);
  if (!data[2] && !t.wants(5) && !t.wants(6)) return;
  layouts.insert(layouts.end(), {layouts[0], layouts[0]});

  for_images(t.images(), [&](int64_t n) {
    // a: the activated maps; d: SiLU's derivatives, which the gradients to the convolutions' results take the place of.
    const Maps maps(layouts);
    const Map &image = maps[0], &to_h3 = maps[5], &direct = maps[6];
    const Map a[2] = {maps[1], maps[3]}, d[2] = {maps[2], maps[4]};
    import_map(kernels, in.image(n), image);
    for (size_t k = 0; k < 2; ++k) {
      const Map& from = k == 0 ? image : a[0];
      const Dense3x3& conv = convolutions[k].forward;
      conv.for_strips(from.layout, 0, [&](int64_t y0, int64_t y1, float*, float* scratch) {
        const MapLayout& m = a[k].layout;
        conv.convolve(from, {}, m, d[k].pixels(), 0, scratch, y0, y1);
        for (int64_t y = y0; y < y1; ++y) {
          float* h = d[k].pixels() + y * m.pitch;
          kernels.silu_parts(h, a[k].pixels() + y * m.pitch, h, m.width * m.step);
        }
        zero_ring(a[k], y0, y1);
        zero_ring(d[k], y0, y1);
      });
      count_pass(Pass::kAgain);
    }
    import_map(kernels, g.image(n), to_h3);
    const MapLayout& last = to_h3.layout;
    const Dense3x3& third = convolutions[2].forward;
    third.for_strips(a[1].layout, last.pitch, [&](int64_t y0, int64_t y1, float* h, float* scratch) {
      third.convolve(a[1], {}, last, h, y0, scratch, y0, y1);
      for (int64_t y = y0; y < y1; ++y) {
        const int64_t row = y * last.pitch;
        DerivativeArgs e;
        e.mode = ResidualMode::kAttention;
        e.h = h + row - y0 * last.pitch;
        e.residual = image.pixels() + row;
        e.grad = e.out = to_h3.pixels() + row;
        e.to_residual = t.wants(0) ? direct.pixels() + row : nullptr;
        e.floats = last.width * last.step;
        kernels.derivative(e);
      }
    });
    count_pass(Pass::kAgain);

    convolutions[2].sums.add(n, a[1], a[1].ring, to_h3);
    for (size_t k = 2; k > 0 && data[k]; --k) {
      const Map& from = k == 2 ? to_h3 : d[1];
      const Map& to = d[k - 1];
      const MapLayout& m = to.layout;
      const Dense3x3& conv = convolutions[k].backward;
      if (k == 1 && grad_mid.has_value()) {
        MapLayout rows = m;
        rows.pitch = m.width * m.step;
        conv.for_strips(from.layout, 2 * rows.pitch, [&](int64_t y0, int64_t y1, float* to_a, float* scratch) {
          float* more = to_a + Dense3x3::kStrip * rows.pitch;
          conv.convolve(from, {}, rows, to_a, y0, scratch, y0, y1);
          import_strip(kernels, g_mid.image(n), rows, more, y0, y1);
          for (int64_t y = y0; y < y1; ++y) {
            const int64_t offset = (y - y0) * rows.pitch;
            kernels.add_product(to_a + offset, more + offset, to.pixels() + y * m.pitch, rows.pitch);
          }
        });
      } else {
        Epilogue product;
        product.product = true;
        product.residual = to.pixels();
        product.residual_pitch = m.pitch;
        conv.for_strips(from.layout, 0, [&](int64_t y0, int64_t y1, float*, float* scratch) {
          conv.convolve(from, product, m, to.pixels(), 0, scratch, y0, y1);
        });
      }
      count_pass(Pass::kData);
      const Map& seen = k == 2 ? a[0] : image;
      convolutions[k - 1].sums.add(n, seen, seen.ring, to);
    }
    if (t.wants(0)) {
      Epilogue sum;
      sum.mode = ResidualMode::kPost;
      sum.residual = direct.pixels();
      sum.residual_pitch = direct.layout.pitch;
      // The strips' rows have no ring, but the residual's pixels have the result's step.
      export_data_gradient(kernels, convolutions[0].backward, d[0], sum, to_x.image(n));
    }
  });
  for (size_t k = 0; k < 3; ++k) write_sums(t, convolutions[k], 2 * k + 1, 2 * k + 2);
}

void conv3x3_pixel_shuffle_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t upscale_factor,
                                    const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "conv3x3_pixel_shuffle_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, 4);
  const int64_t r = upscale_factor;
  STD_TORCH_CHECK(r >= 1 && r <= 1024, kName, ": upscale_factor is ", r, ", must be 1..1024");
  const Batch in = t.read(x, "x");
  const Weight w = t.weight(weight, "weight", {-1, in.shape.channels, 3, 3});
  const int64_t channels = w.shape[0];
  STD_TORCH_CHECK(channels % (r * r) == 0, kName, ": weight has ", channels, " output channels, must be a multiple of ",
                  r * r);
  const Shape image{channels / (r * r), in.shape.height * r, in.shape.width * r};
  const Batch g = t.read(grad, "grad", image);
  const Batch to_x = t.target(0, "the gradient to x", in.shape);
  if (t.wants(3)) {
    t.target(3, "the gradient to residual", image);
    t.copy(3, grad);
  }
  if (!t.wants(0) && !t.wants(1) && !t.wants(2)) return;
  Convolution c(kernels, in, w, {}, false, t.wants(0), t.wants(1), t.wants(2));

  for_images(t.images(), [&](int64_t n) {
    const Maps maps({layout_for(kernels, in.shape), layout_for(kernels, {channels, in.shape.height, in.shape.width})});
    if (t.wants(1)) import_map(kernels, in.image(n), maps[0]);
    const Map& to_h = maps[1];
    UnshuffleArgs a;
    a.tensor = g.image(n);
    a.colours = image.channels;
    a.width = in.shape.width;
    a.factor = r;
    a.out = to_h.pixels();
    a.pitch = to_h.layout.pitch;
    a.step = to_h.layout.step;
    parallel_ranges(in.shape.height, a.width * a.step * 8, [&](int64_t y0, int64_t y1) {
      const Workspace scratch(a.width * r);
      UnshuffleArgs mine = a;
      mine.scratch = scratch.data();
      kernels.unshuffle_rows(mine, y0, y1);
      zero_ring(to_h, y0, y1);
    });
    c.sums.add(n, maps[0], maps[0].ring, to_h);
    if (t.wants(0)) export_data_gradient(kernels, c.backward, to_h, {}, to_x.image(n));
  });
  write_sums(t, c, 1, 2);
}

}  // namespace esr
