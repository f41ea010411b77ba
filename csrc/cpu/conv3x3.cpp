#include "dense3x3.h"
#include "operator.h"

namespace esr {
namespace {

// 3x3 convolution with everything that may follow it; with an upscale factor its result is written, shuffled, to the
// outside tensors.
class Conv3x3 final : public Operator {
 public:
  Conv3x3(const Layer& layer, const Kernels& kernels, const Weights& weights)
      : Operator(layer, kernels), shuffles_(layer.op == Op::kConv3x3PixelShuffle) {
    const Weight& w = weight_of(layer, 0, weights, "weight", {-1, -1, 3, 3});
    cout_ = w.shape[0];
    cin_ = w.shape[1];
    dense_ = Dense3x3(w, bias_of(layer, 1, weights, "bias", cout_, kernels.lanes).data(), kernels);
  }

  Shape result(const std::vector<Shape>& in) const override { return conv3x3_result(layer_, cout_, cin_, in); }

  bool reads_tensor(size_t k) const override { return shuffles_ && k == 1; }
  bool reads_strips(size_t) const override { return true; }
  bool exports_directly() const override { return true; }
  bool takes_enlarged_residual() const override { return shuffles_; }

  void run(const Run& run) const override {
    const Map& in = run.inputs[0];
    const int64_t height = in.layout.height, width = in.layout.width;
    const bool to_map = run.output.ring != nullptr;
    MapLayout out = MapLayout::make(cout_, height, width, kernels_.lanes);
    if (!to_map) out.pitch = width * out.step;

    Epilogue epilogue;
    epilogue.activation = layer_.activation;
    epilogue.slope = layer_.slope;
    const Map* residual = layer_.has_residual && !shuffles_ ? &run.inputs[1] : nullptr;
    if (residual != nullptr) {
      epilogue.mode = layer_.residual_mode;
      epilogue.residual_pitch = residual->layout.pitch;
    }
    const int64_t in_floats = in.ring == nullptr ? kImportedRows * in.layout.pitch : 0;
    const bool imports_residual = residual != nullptr && residual->ring == nullptr;
    const int64_t residual_floats = imports_residual ? Dense3x3::kStrip * epilogue.residual_pitch : 0;
    dense_.for_strips(in.layout, to_map ? 0 : out.pitch, [&](int64_t y0, int64_t y1, float* rows, float* scratch) {
      float* pixels = to_map ? run.output.pixels() : rows;
      const int64_t first_row = to_map ? 0 : y0;
      const Workspace imported(in_floats + residual_floats);
      Epilogue mine = epilogue;
      if (residual != nullptr) {
        mine.residual =
            imports_residual ? import_residual(*residual, imported.data() + in_floats, y0, y1) : residual->pixels();
      }
      const Map source = in.ring == nullptr ? import_rows(in, imported.data(), y0, y1) : in;
      dense_.convolve(source, mine, out, pixels, first_row, scratch, y0, y1);
      if (shuffles_) {
        export_shuffled(kernels_, layer_, run, out, pixels, first_row, y0, y1);
      } else {
        if (to_map) zero_ring(run.output, y0, y1);
        export_rows(kernels_, run.exports, out, pixels, first_row, y0, y1);
      }
    });
  }

 private:
  // A strip's rows, those above and below it that the filter reads, and one more on both sides: where one of the former
  // is the image's first or last, the ring beyond it is zeroed.
  static constexpr int64_t kImportedRows = Dense3x3::kStrip + 4;

  // The map of which the rows under rows [y0, y1) of the result exist.
  Map import_rows(const Map& in, float* rows, int64_t y0, int64_t y1) const {
    const MapLayout& m = in.layout;
    Map strip = in;
    strip.ring = rows - (y0 - 1) * m.pitch;
    const int64_t first = std::max<int64_t>(y0 - 1, 0), last = std::min(y1 + 1, m.height);
    import_strip(kernels_, in.tensor, m, strip.pixels() + first * m.pitch, first, last);
    zero_ring(strip, first, last);
    return strip;
  }

  // Pixel 0 of row 0 of a residual of which rows [y0, y1) exist.
  const float* import_residual(const Map& residual, float* rows, int64_t y0, int64_t y1) const {
    import_strip(kernels_, residual.tensor, residual.layout, rows, y0, y1);
    return rows - y0 * residual.layout.pitch;
  }

  bool shuffles_;
  int64_t cout_ = 0, cin_ = 0;
  Dense3x3 dense_;
};

}  // namespace

Shape conv3x3_result(const Layer& layer, int64_t cout, int64_t cin, const std::vector<Shape>& in) {
  check_channels(layer, in[0], cin, "x");
  const int64_t r = layer.upscale_factor;
  STD_TORCH_CHECK(cout % (r * r) == 0, layer.name(), ": weight gives ", cout, " channels, which upscale_factor ", r,
                  " squared does not divide");
  const Shape out{cout / (r * r), in[0].height * r, in[0].width * r};
  if (layer.has_residual) {
    check_channels(layer, in[1], out.channels, "residual");
    check_same_size(layer, out, in[1], "residual");
  }
  return out;
}

std::unique_ptr<Operator> make_conv3x3(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Conv3x3>(layer, kernels, weights);
}

}  // namespace esr
