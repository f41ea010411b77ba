#include "operator.h"

namespace esr {
namespace {

// Enlargement by a whole factor: a map of its own, or strip by strip what a pixel shuffle adds to its image.
class Enlargement final : public Operator {
 public:
  Enlargement(const Layer& layer, const Kernels& kernels) : Operator(layer, kernels) {
    for (int64_t k = 0; k < layer.upscale_factor; ++k) {
      taps_.push_back(resize_taps(layer.resize, layer.upscale_factor, k));
    }
  }

  Shape result(const std::vector<Shape>& in) const override {
    return {in[0].channels, in[0].height * layer_.upscale_factor, in[0].width * layer_.upscale_factor};
  }

  bool enlarges() const override { return true; }

  int64_t strip_floats(const Map& in, int64_t rows) const override {
    const ResizePlanesArgs a = planes(in);
    return rows * a.factor * a.width * a.factor * a.channels + kernels_.resize_planes_floats(a, rows);
  }

  TensorView enlarge(const Map& in, int64_t y0, int64_t y1, float* memory) const override {
    ResizePlanesArgs a = planes(in);
    TensorView strip;
    strip.column_stride = 1;
    strip.row_stride = a.width * a.factor;
    strip.channel_stride = a.plane = (y1 - y0) * a.factor * strip.row_stride;
    a.out = memory;
    a.scratch = memory + a.channels * a.plane;
    kernels_.resize_planes(a, y0, y1);
    strip.data = memory - y0 * a.factor * strip.row_stride;
    return strip;
  }

  void run(const Run& run) const override {
    const MapLayout &in = run.inputs[0].layout, &out = run.output.layout;
    ResizeMapArgs a;
    a.in = run.inputs[0].pixels();
    a.in_pitch = in.pitch;
    a.height = in.height;
    a.width = in.width;
    a.step = in.step;
    a.out = run.output.pixels();
    a.out_pitch = out.pitch;
    a.factor = layer_.upscale_factor;
    a.taps = taps_.data();
    const int64_t taps = taps_[0].count * taps_[0].count;
    parallel_ranges(out.height, out.width * out.step * (4 + taps), [&](int64_t y0, int64_t y1) {
      kernels_.resize_map(a, y0, y1);
      complete_rows(kernels_, run, y0, y1);
    });
  }

 private:
  ResizePlanesArgs planes(const Map& in) const {
    ResizePlanesArgs a;
    a.in = in.view();
    a.channels = in.layout.channels;
    a.height = in.layout.height;
    a.width = in.layout.width;
    a.factor = layer_.upscale_factor;
    a.taps = taps_.data();
    return a;
  }

  std::vector<ResizeTaps> taps_;  // of every phase
};

// Some of a map's channels.
class Slice final : public Operator {
 public:
  using Operator::Operator;

  Shape result(const std::vector<Shape>& in) const override {
    STD_TORCH_CHECK(in[0].channels < 0 || layer_.start + layer_.channels <= in[0].channels, layer_.name(), ": x has ",
                    in[0].channels, " channels, ", layer_.start + layer_.channels, " are needed");
    return {layer_.channels, in[0].height, in[0].width};
  }

  bool computes_rows() const override { return true; }
  bool is_view() const override { return true; }
  bool has_rows() const override { return true; }
  int64_t row_cost(const Run& run) const override { return run.output.layout.width * run.output.layout.step * 4; }

  void compute_row(const std::vector<Map>& inputs, const MapLayout& rows, int64_t y, float* out,
                   float*) const override {
    SliceArgs a = args(inputs[0], rows);
    a.in += y * a.in_pitch;
    a.out = out;
    kernels_.slice_rows(a, 0, 1);
  }

  void run_rows(const Run& run, int64_t y0, int64_t y1) const override {
    SliceArgs a = args(run.inputs[0], run.output.layout);
    a.out = run.output.pixels();
    kernels_.slice_rows(a, y0, y1);
    complete_rows(kernels_, run, y0, y1);
  }

 private:
  SliceArgs args(const Map& in, const MapLayout& out) const {
    SliceArgs a;
    a.in = in.pixels() + layer_.start;
    a.in_pitch = in.layout.pitch;
    a.in_step = in.layout.step;
    a.out_pitch = out.pitch;
    a.out_step = out.step;
    a.channels = layer_.channels;
    a.width = out.width;
    return a;
  }
};

}  // namespace

std::unique_ptr<Operator> make_resize(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<Enlargement>(layer, kernels);
}

std::unique_ptr<Operator> make_slice(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<Slice>(layer, kernels);
}

}  // namespace esr
