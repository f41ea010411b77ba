#include "conv1x1_backward.h"

#include "backward.h"
#include "capability.h"

namespace esr {

using torch::stable::Tensor;

void conv1x1_backward(const Tensor& grad, const std::vector<Tensor>& xs, const Tensor& weight,
                      const std::optional<Tensor>& bias, int64_t activation, double slope,
                      const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "conv1x1_backward";
  const Kernels& kernels = active_kernels();
  const size_t inputs = xs.size();
  STD_TORCH_CHECK(inputs >= 1 && inputs <= static_cast<size_t>(Conv1x1Args::kMaxInputs), kName, ": ", inputs,
                  " inputs given, allowed are 1..", Conv1x1Args::kMaxInputs);
  Gradients t(kName, gradients, inputs + 2);
  const DerivativeArgs epilogue = t.epilogue(activation, slope);
  const bool again = epilogue.activation != Activation::kNone;
  const size_t to_weight = inputs, to_bias = inputs + 1;

  std::vector<Batch> in, to_x;
  std::vector<MapLayout> layouts;
  int64_t channels = 0;
  bool any = t.wants(to_weight) || t.wants(to_bias);
  for (size_t i = 0; i < inputs; ++i) {
    in.push_back(t.read(xs[i], "an input"));
    const Shape &first = in[0].shape, &shape = in[i].shape;
    STD_TORCH_CHECK(shape.height == first.height && shape.width == first.width, kName, ": an input is ", shape.height,
                    "x", shape.width, ", must be ", first.height, "x", first.width);
    to_x.push_back(t.target(i, "the gradient to an input", shape));
    layouts.push_back(layout_for(kernels, shape));
    channels += shape.channels;
    any = any || t.wants(i);
  }
  const int64_t height = in[0].shape.height, width = in[0].shape.width;
  const Weight w = t.weight(weight, "weight", {-1, channels, 1, 1});
  const int64_t cout = w.shape[0];
  const std::vector<float> b = t.bias(bias, "bias", cout);
  const Batch g = t.read(grad, "grad", {cout, height, width});
  layouts.push_back(layout_for(kernels, g.shape));
  if (!any) return;

  const Dense1x1 forward = again ? Dense1x1(w, data_or_null(b), kernels) : Dense1x1();
  const Weight transposed = adjoint(w);
  std::vector<Dense1x1> backward(inputs);
  std::vector<WeightSums> sums;
  int64_t first = 0;
  for (size_t i = 0; i < inputs; ++i) {
    const int64_t cin = in[i].shape.channels;
    if (t.wants(i)) backward[i] = Dense1x1(slice(transposed, first, cin), nullptr, kernels);
    sums.emplace_back(kernels, WeightSums::Filter{1, 1, false}, cin, cout, t.images(), height, width,
                      t.wants(to_weight), i == 0 && t.wants(to_bias));
    first += cin;
  }

  for_images(t.images(), [&](int64_t n) {
    const Maps maps(layouts);
    std::vector<Map> images;
    for (size_t i = 0; i < inputs; ++i) {
      images.push_back(maps[i]);
      if (again || t.wants(to_weight)) import_map(kernels, in[i].image(n), nullptr, nullptr, maps[i], {});
    }
    const Map& to_h = maps[inputs];
    import_map(kernels, g.image(n), nullptr, nullptr, to_h, {});
    if (again) {
      const int64_t pitch = width * to_h.layout.step;
      for_strips(height, forward.row_cost(width), [&](int64_t y0, int64_t y1) {
        const Workspace h((y1 - y0) * pitch);
        forward.convolve(images, {}, h.data(), pitch, y0, y1);
        differentiate_rows(kernels, epilogue, h.data(), to_h, y0, y1);
      });
      count_pass(Pass::kAgain);
    }
    for (size_t i = 0; i < inputs; ++i) {
      sums[i].add(n, images[i], images[i].pixels(), to_h);
      if (t.wants(i)) {
        export_data_gradient(kernels, backward[i], to_h, {}, to_x[i].image(n), in[i].shape.channels);
      }
    }
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
