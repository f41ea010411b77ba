#include "operator.h"

namespace esr {
namespace {

// A function of every element, with two numbers for each channel.
class Activate final : public Operator {
 public:
  Activate(const Layer& layer, const Kernels& kernels)
      : Operator(layer, kernels), channels_(static_cast<int64_t>(layer.low.size())) {
    low_ = pack_vector(layer.low.data(), channels_, kernels.lanes);
    high_ = pack_vector(layer.high.data(), channels_, kernels.lanes);
  }

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], channels_, "x");
    return {channels_, in[0].height, in[0].width};
  }

  bool overwrites(size_t) const override { return true; }

  bool has_rows() const override { return true; }
  int64_t row_cost(const Run& run) const override {
    constexpr int64_t kCost = 8;  // multiply-adds in the time of one element, or so
    return run.output.layout.width * run.output.layout.step * kCost;
  }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    const MapLayout& m = run.output.layout;
    ActivateArgs a;
    a.x = run.inputs[0].pixels();
    a.out = run.output.pixels();
    a.low = low_.data();
    a.high = high_.data();
    a.pitch = m.pitch;
    a.step = m.step;
    a.width = m.width;
    a.function = layer_.function;
    kernels_.activate(a, y0, y1);
    complete_rows(kernels_, run, y0, y1);
  }

 private:
  int64_t channels_;
  PackedFloats low_, high_;
};

}  // namespace

std::unique_ptr<Operator> make_activate(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<Activate>(layer, kernels);
}

}  // namespace esr
