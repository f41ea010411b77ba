#include "step.h"

namespace esr::cuda {
namespace {

std::string to_string(const int32_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

}  // namespace

WeightView Step::weight_of(size_t k, const Weights& weights, const char* what,
                           const std::vector<int64_t>& shape) const {
  if (layer_.weights[k] < 0) return {};
  const WeightView& w = weights[static_cast<size_t>(layer_.weights[k])];
  bool fits = w.dimensions == static_cast<int32_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 ? w.sizes[i] >= 1 : w.sizes[i] == shape[i];
  STD_TORCH_CHECK(fits, layer_.name(), ": ", what, " has shape ", to_string(w.sizes, static_cast<size_t>(w.dimensions)),
                  ", must be ", to_string(shape));
  return w;
}

View blocked_view(unsigned char* data, Precision precision, const Shape& shape) {
  View v;
  v.data = data;
  v.channels = static_cast<int32_t>(shape.channels);
  v.channel = value_bytes(precision);
  v.pixel = round_up(shape.channels * v.channel, kUnitBytes);
  v.row = shape.width * v.pixel;
  v.image = shape.height * v.row;
  v.blocked = true;
  return v;
}

int64_t blocked_bytes(Precision precision, const Shape& shape, int64_t batch) {
  return batch * blocked_view(nullptr, precision, shape).image;
}

}  // namespace esr::cuda
