#include "operator.h"

namespace esr {
namespace {

// (x - shift) * scale for each channel: done while a plan's input is brought into the internal layout.
class Normalize final : public Operator {
 public:
  Normalize(const Layer& layer, const Kernels& kernels)
      : Operator(layer, kernels), channels_(static_cast<int64_t>(layer.shift.size())) {
    shift_ = pack_vector(layer.shift.data(), channels_, kernels.lanes);
    scale_ = pack_vector(layer.scale.data(), channels_, kernels.lanes);
  }

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], channels_, "x");
    return {channels_, in[0].height, in[0].width};
  }

  bool reads_tensor(size_t) const override { return true; }

  bool has_rows() const override { return true; }
  int64_t row_cost(const Run& run) const override { return import_cost(run.output.layout); }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    import_map_rows(kernels_, run.inputs[0].view(), shift_.data(), scale_.data(), run.output, run.exports, y0, y1);
  }

 private:
  int64_t channels_;
  PackedFloats shift_, scale_;
};

}  // namespace

std::unique_ptr<Operator> make_normalize(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<Normalize>(layer, kernels);
}

}  // namespace esr
