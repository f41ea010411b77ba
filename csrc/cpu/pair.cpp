#include "operator.h"

namespace esr {
namespace {

// Sum or product of two maps, element by element; the second may have one channel, which is that of all of the first,
// and of a sum one pixel, likewise.
class Pair final : public Operator {
 public:
  using Operator::Operator;

  Shape result(const std::vector<Shape>& in) const override {
    if (in[0].channels >= 0 && in[1].channels != 1) check_channels(in[1], in[0].channels, "b");
    if (!layer_.adds_to_every) check_same_size(in[0], in[1], "b");
    const int64_t channels = in[0].channels < 0 && in[1].channels > 1 ? in[1].channels : in[0].channels;
    return {channels, in[0].height, in[0].width};
  }

  bool overwrites(size_t) const override { return true; }

  bool has_rows() const override { return true; }
  bool reads_rows(size_t k) const override { return k == 0 || !layer_.adds_to_every; }
  int64_t row_cost(const Run& run) const override { return run.output.layout.width * run.output.layout.step * 4; }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    const MapLayout& m = run.output.layout;
    PairArgs a;
    a.a = run.inputs[0].pixels();
    a.b = run.inputs[1].pixels();
    a.out = run.output.pixels();
    a.pitch = m.pitch;
    a.floats = m.width * m.step;
    a.channels = m.channels;
    a.step = m.step;
    const MapLayout& b = run.inputs[1].layout;
    a.one_channel = b.channels == 1 && m.channels > 1;
    if (!layer_.adds_to_every) {
      a.b_pitch = b.pitch;
      a.b_step = b.step;
    }
    (layer_.op == Op::kAdd ? kernels_.add : kernels_.multiply)(a, y0, y1);
    complete_rows(kernels_, run, y0, y1);
  }
};

}  // namespace

std::unique_ptr<Operator> make_pair(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<Pair>(layer, kernels);
}

}  // namespace esr
