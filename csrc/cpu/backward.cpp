#include "backward.h"

#include <array>

namespace esr {
namespace {

using torch::stable::Tensor;

std::array<std::atomic<int64_t>, 3> counters{};

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

}  // namespace

void count_pass(Pass pass) { ++counters[static_cast<size_t>(pass)]; }

std::vector<int64_t> passes() { return {counters.begin(), counters.end()}; }

Gradients::Gradients(const char* name, const std::vector<Tensor>& gradients, size_t count)
    : name_(name), gradients_(gradients) {
  STD_TORCH_CHECK(gradients.size() == count, name, ": ", gradients.size(), " gradients given, must be ", count);
}

Batch Gradients::read(const Tensor& t, const char* what) {
  const Batch b = read_batch(t, false, what);
  if (images_ < 0) images_ = b.images;
  STD_TORCH_CHECK(b.images == images_, name_, ": ", what, " has ", b.images, " images, must have ", images_);
  return b;
}

Batch Gradients::read(const Tensor& t, const char* what, const Shape& shape) {
  const Batch b = read(t, what);
  STD_TORCH_CHECK(b.shape.channels == shape.channels && b.shape.height == shape.height && b.shape.width == shape.width,
                  name_, ": ", what, " is ", to_string({b.shape.channels, b.shape.height, b.shape.width}), ", must be ",
                  to_string({shape.channels, shape.height, shape.width}));
  return b;
}

Batch Gradients::target(size_t k, const char* what, const Shape& shape) {
  if (!wants(k)) return {};
  read(gradients_[k], what, shape);
  return read_batch(gradients_[k], true, what);
}

Weight Gradients::weight(const Tensor& t, const char* what, const std::vector<int64_t>& shape) const {
  Weight w = read_weight(t, what);
  bool fits = w.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] < 0 ? w.shape[i] >= 1 : w.shape[i] == shape[i];
  }
  STD_TORCH_CHECK(fits, name_, ": ", what, " is ", to_string(w.shape), ", must be ", to_string(shape));
  return w;
}

std::vector<float> Gradients::bias(const std::optional<Tensor>& t, const char* what, int64_t channels) const {
  return t.has_value() ? weight(*t, what, {channels}).values : std::vector<float>();
}

void Gradients::write(size_t k, const char* what, const std::vector<float>& values) const {
  write_weight(gradients_[k], what, values);
}

DerivativeArgs Gradients::epilogue(int64_t activation, double slope) const {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, name_, ": activation is ", activation,
                  ", must be 0..", kActivationCount - 1);
  DerivativeArgs a;
  a.activation = static_cast<Activation>(activation);
  a.slope = static_cast<float>(slope);
  return a;
}

void Gradients::copy(size_t k, const Tensor& from) const {
  Tensor to = gradients_[k];
  torch::stable::copy_(to, from);
}

int64_t Maps::floats(const std::vector<MapLayout>& layouts) {
  int64_t sum = 0;
  for (const MapLayout& m : layouts) sum += round_up(m.floats(), 16);
  return sum;
}

Maps::Maps(const std::vector<MapLayout>& layouts) : workspace_(floats(layouts)) {
  float* free = workspace_.data();
  for (const MapLayout& m : layouts) {
    Map map;
    map.ring = free;
    map.layout = m;
    maps_.push_back(map);
    free += round_up(m.floats(), 16);
  }
}

WeightSums::WeightSums(const Kernels& kernels, const Filter& filter, int64_t cin, int64_t cout, int64_t images,
                       bool weight, bool bias)
    : kernels_(kernels),
      filter_(filter),
      cin_(cin),
      cout_(cout),
      step_(round_up(cout, kernels.lanes)),
      images_(images),
      wants_weight_(weight),
      wants_bias_(bias) {
  floats_ = (weight ? filter.side * filter.side * cin * step_ : 0) + (bias ? step_ : 0);
  parts_ = PackedFloats(images * floats_);
}

void WeightSums::add(int64_t image, const Map& x, const float* first, const Map& g) {
  if (floats_ == 0) return;
  const int64_t height = g.layout.height, width = g.layout.width;
  WeightGradientArgs a;
  a.x = first;
  a.x_pitch = x.layout.pitch;
  a.x_step = x.layout.step;
  a.x_row_step = filter_.stride * x.layout.pitch;
  a.x_pixel_step = filter_.stride * x.layout.step;
  a.cin = cin_;
  a.g = g.pixels();
  a.g_pitch = g.layout.pitch;
  a.g_step = step_;
  a.width = width;
  a.height = height;
  a.side = filter_.side;
  const int64_t weights = floats_ - (wants_bias_ ? step_ : 0);
  const int64_t unit = filter_.winograd ? 4 : 1, units = ceil_div(height, unit);
  // Parts of some thousand pixels, so that what is done once for a part does not count.
  const int64_t parts = std::clamp<int64_t>(height * width / 2048, 1, std::min<int64_t>(units, 16));
  const int64_t units_each = ceil_div(units, parts);
  float* const to = parts_.data() + image * floats_;
  const Workspace memory(parts > 1 ? (parts - 1) * floats_ : 0);
  const auto part = [&](int64_t k) { return k == 0 ? to : memory.data() + (k - 1) * floats_; };
  const int64_t used = ceil_div(units, units_each);
  const int64_t cost = units_each * unit * width * step_ * (1 + (wants_weight_ ? cin_ * filter_.side : 0));
  parallel_ranges(used, cost, [&](int64_t k0, int64_t k1) {
    WeightGradientArgs mine = a;
    const Workspace scratch(
        filter_.winograd && wants_weight_ ? kernels_.winograd_weight_scratch_floats(cin_, a.x_step, step_, width) : 0);
    mine.scratch = scratch.data();
    for (int64_t k = k0; k < k1; ++k) {
      mine.out = part(k);
      const int64_t u0 = k * units_each, u1 = std::min(u0 + units_each, units);
      if (wants_weight_) {
        if (filter_.depthwise) {
          kernels_.depthwise_gradient({a.x, a.x_pitch, a.g, a.g_pitch, step_, width, mine.out}, u0, u1);
        } else if (filter_.winograd) {
          kernels_.winograd_weight_gradient(mine, u0, u1);
        } else {
          kernels_.weight_gradient(mine, u0, u1);
        }
      }
      if (wants_bias_) {
        kernels_.sum_rows(a.g, a.g_pitch, step_, width, mine.out + weights, u0 * unit, std::min(u1 * unit, height));
      }
    }
  });
  for (int64_t k = 1; k < used; ++k) {
    for (int64_t i = 0; i < floats_; ++i) to[i] += part(k)[i];
  }
  if (wants_weight_) count_pass(Pass::kWeight);
}

std::vector<float> WeightSums::total(int64_t offset, int64_t count) const {
  std::vector<float> sum(static_cast<size_t>(count), 0.0f);
  for (int64_t n = 0; n < images_; ++n) {
    const float* part = parts_.data() + n * floats_ + offset;
    for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
  }
  return sum;
}

std::vector<float> WeightSums::weight() const {
  const int64_t taps = filter_.side * filter_.side;
  const std::vector<float> sum = total(0, taps * cin_ * step_);
  std::vector<float> w(static_cast<size_t>(cout_ * cin_ * taps));
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t i = 0; i < cin_; ++i) {
      for (int64_t o = 0; o < cout_; ++o) w[(o * cin_ + i) * taps + t] = sum[(t * cin_ + i) * step_ + o];
    }
  }
  return w;
}

std::vector<float> WeightSums::bias() const {
  std::vector<float> b = total(floats_ - step_, step_);
  b.resize(static_cast<size_t>(cout_));
  return b;
}

Weight adjoint(const Weight& w) {
  const int64_t cout = w.shape[0], cin = w.shape[1], taps = w.shape[2] * w.shape[3];
  Weight a;
  a.shape = {cin, cout, w.shape[2], w.shape[3]};
  a.values.resize(w.values.size());
  for (int64_t o = 0; o < cout; ++o) {
    for (int64_t i = 0; i < cin; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        a.values[(i * cout + o) * taps + t] = w.values[(o * cin + i) * taps + taps - 1 - t];
      }
    }
  }
  return a;
}

void differentiate_rows(const Kernels& kernels, DerivativeArgs epilogue, const float* h, const Map& grad, int64_t y0,
                        int64_t y1) {
  epilogue.floats = grad.layout.width * grad.layout.step;
  const float* const residual = epilogue.residual;
  for (int64_t y = y0; y < y1; ++y) {
    epilogue.h = h + (y - y0) * epilogue.floats;
    if (residual != nullptr) epilogue.residual = residual + (y - y0) * epilogue.floats;
    epilogue.out = grad.pixels() + y * grad.layout.pitch;
    epilogue.grad = epilogue.out;
    kernels.derivative(epilogue);
  }
}

Weight slice(const Weight& w, int64_t first, int64_t count) {
  Weight s;
  s.shape = w.shape;
  s.shape[0] = count;
  const int64_t each = static_cast<int64_t>(w.values.size()) / w.shape[0];
  s.values.assign(w.values.begin() + first * each, w.values.begin() + (first + count) * each);
  return s;
}

Dense1x1::Dense1x1(const Weight& w, const float* bias, const Kernels& kernels)
    : kernels_(&kernels), cin_(w.shape[1]), step_(round_up(w.shape[0], kernels.lanes)) {
  weights_ = pack_conv1x1(w, kernels.lanes);
  bias_ = pack_vector(bias, w.shape[0], kernels.lanes);
}

void Dense1x1::convolve(const std::vector<Map>& in, const Epilogue& epilogue, float* out, int64_t pitch, int64_t y0,
                        int64_t y1) const {
  Conv1x1Args a;
  a.inputs = static_cast<int64_t>(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    a.in[i] = in[i].pixels();
    a.in_pitch[i] = in[i].layout.pitch;
    a.in_step[i] = in[i].layout.step;
    a.cin[i] = in[i].layout.channels;
  }
  a.out = out - y0 * pitch;
  a.out_pitch = pitch;
  a.out_step = step_;
  a.width = in[0].layout.width;
  a.out_vectors = step_ / kernels_->lanes;
  a.weights = weights_.data();
  a.bias = bias_.data();
  a.epilogue = epilogue;
  kernels_->conv1x1(a, y0, y1);
}

void export_data_gradient(const Kernels& kernels, const Dense1x1& adjoint, const Map& g, const Epilogue& epilogue,
                          const TensorView& to, int64_t channels) {
  MapLayout rows = MapLayout::make(channels, g.layout.height, g.layout.width, kernels.lanes);
  rows.pitch = rows.width * rows.step;
  for_strips(rows.height, adjoint.row_cost(rows.width), [&](int64_t y0, int64_t y1) {
    const Workspace out((y1 - y0) * rows.pitch);
    adjoint.convolve({g}, epilogue, out.data(), rows.pitch, y0, y1);
    export_rows(kernels, {to}, rows, out.data(), y0, y0, y1);
  });
  count_pass(Pass::kData);
}

void export_data_gradient(const Kernels& kernels, const Dense3x3& adjoint, const Map& g, const Epilogue& epilogue,
                          const TensorView& to) {
  MapLayout rows = MapLayout::make(adjoint.cout(), g.layout.height, g.layout.width, kernels.lanes);
  rows.pitch = rows.width * rows.step;
  adjoint.for_strips(g.layout, rows.pitch, [&](int64_t y0, int64_t y1, float* out, float* scratch) {
    adjoint.convolve(g, epilogue, rows, out, y0, scratch, y0, y1);
    export_rows(kernels, {to}, rows, out, y0, y0, y1);
  });
  count_pass(Pass::kData);
}

}  // namespace esr
