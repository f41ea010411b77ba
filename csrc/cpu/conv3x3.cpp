#include <cstdlib>
#include <cstring>

#include "operator.h"

namespace esr {
namespace {

// Whether a convolution runs as Winograd F(4x4, 3x3): a function of the layer alone, never of the image, so that a tile
// of an image (cut at multiples of 4 pixels) gives the bits of the whole. With fewer channels the transforms cost more
// than they save. ESR_KERNELS_CPU_WINOGRAD=0, read when a plan is compiled, keeps every convolution direct: 3x to 10x
// less rounding error and about half the speed.
bool use_winograd(int64_t cin, int64_t cout) {
  const char* setting = std::getenv("ESR_KERNELS_CPU_WINOGRAD");
  if (setting != nullptr && std::strcmp(setting, "0") == 0) return false;
  return cin >= 16 && cout >= 16;
}

// 3x3 convolution with everything that may follow it; with an upscale factor its result is written, shuffled, to the
// outside tensors.
class Conv3x3 final : public Operator {
 public:
  Conv3x3(const Layer& layer, const Kernels& kernels, const Weights& weights)
      : Operator(layer, kernels), shuffles_(layer.op == Op::kConv3x3PixelShuffle) {
    const Weight& w = weight_of(layer, 0, weights, "weight", {-1, -1, 3, 3});
    cout_ = w.shape[0];
    cin_ = w.shape[1];
    const int64_t r = layer.upscale_factor;
    STD_TORCH_CHECK(cout_ % (r * r) == 0, layer.name(), ": weight gives ", cout_, " channels, which upscale_factor ", r,
                    " squared does not divide");
    winograd_ = use_winograd(cin_, cout_);
    weights_ = winograd_ ? pack_winograd(w, kernels.lanes) : pack_conv3x3(w, kernels.lanes);
    bias_ = bias_of(layer, 1, weights, "bias", cout_, kernels.lanes);
  }

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], cin_, "x");
    const int64_t r = layer_.upscale_factor;
    const Shape out{cout_ / (r * r), in[0].height * r, in[0].width * r};
    if (layer_.has_residual) {
      check_channels(in[1], out.channels, "residual");
      check_same_size(out, in[1], "residual");
    }
    return out;
  }

  bool reads_tensor(size_t k) const override { return shuffles_ && k == 1; }
  bool exports_directly() const override { return true; }

  void run(const Run& run) const override {
    const Map& in = run.inputs[0];
    const int64_t height = in.layout.height, width = in.layout.width;
    const bool to_map = run.output.ring != nullptr;
    const MapLayout out = MapLayout::make(cout_, height, width, kernels_.lanes);
    const int64_t unit = winograd_ ? 4 : 1;  // rows that are computed together
    const int64_t strip = std::max<int64_t>(unit, 8);

    Epilogue epilogue;
    epilogue.activation = layer_.activation;
    epilogue.slope = layer_.slope;
    if (layer_.has_residual && !shuffles_) {
      epilogue.mode = layer_.residual_mode;
      epilogue.residual = run.inputs[1].pixels();
      epilogue.residual_pitch = run.inputs[1].layout.pitch;
    }
    const int64_t cost = unit * width * out.step * cin_ * (winograd_ ? 4 : 9);
    parallel_ranges(ceil_div(height, unit), cost, [&](int64_t first, int64_t last) {
      const Workspace rows(to_map ? 0 : strip * width * out.step);
      const Workspace scratch(winograd_ ? kernels_.winograd_scratch_floats(in.layout.step, width) : 0);
      const int64_t end = std::min(last * unit, height);
      for (int64_t y = first * unit; y < end; y += strip) {
        const int64_t y1 = std::min(y + strip, end);
        MapLayout target = out;
        float* pixels = run.output.ring == nullptr ? rows.data() : run.output.pixels();
        if (!to_map) target.pitch = width * out.step;
        const int64_t first_row = to_map ? 0 : y;
        convolve(in, epilogue, target, pixels, first_row, scratch.data(), y, y1);
        if (shuffles_) {
          shuffle(run, target, pixels, first_row, y, y1);
        } else {
          if (to_map) zero_ring(run.output, y, y1);
          export_rows(kernels_, run.exports, target, pixels, first_row, y, y1);
        }
      }
    });
  }

 private:
  // Rows [y0, y1), `out` being pixel 0 of row first_row.
  void convolve(const Map& in, const Epilogue& epilogue, const MapLayout& target, float* out, int64_t first_row,
                float* scratch, int64_t y0, int64_t y1) const {
    if (winograd_) {
      WinogradArgs a;
      a.in = in.pixels();
      a.in_pitch = in.layout.pitch;
      a.in_step = in.layout.step;
      a.cin = cin_;
      a.out = out;
      a.out_first_row = first_row;
      a.out_pitch = target.pitch;
      a.out_step = target.step;
      a.width = target.width;
      a.height = target.height;
      a.out_vectors = target.step / kernels_.lanes;
      a.weights = weights_.data();
      a.bias = bias_.data();
      a.scratch = scratch;
      a.epilogue = epilogue;
      kernels_.winograd(a, y0 / 4, ceil_div(y1, 4));
      return;
    }
    Conv3x3Args a;
    a.in = in.ring;
    a.in_pitch = a.in_row_step = in.layout.pitch;
    a.in_step = a.in_pixel_step = in.layout.step;
    a.cin = cin_;
    a.out = out;
    a.out_first_row = first_row;
    a.out_pitch = target.pitch;
    a.out_step = target.step;
    a.width = target.width;
    a.out_vectors = target.step / kernels_.lanes;
    a.weights = weights_.data();
    a.bias = bias_.data();
    a.epilogue = epilogue;
    kernels_.conv3x3(a, y0, y1);
  }

  void shuffle(const Run& run, const MapLayout& rows, const float* pixels, int64_t first_row, int64_t y0,
               int64_t y1) const {
    const int64_t r = layer_.upscale_factor;
    const Workspace scratch(2 * rows.width * r);
    ShuffleArgs a;
    a.in = pixels;
    a.first_row = first_row;
    a.pitch = rows.pitch;
    a.step = rows.step;
    a.colours = cout_ / (r * r);
    a.width = rows.width;
    a.factor = r;
    if (layer_.has_residual) a.residual = run.inputs[1].view();
    a.scratch = scratch.data();
    for (const TensorView& t : run.exports) {
      a.tensor = t;
      kernels_.shuffle_rows(a, y0, y1);
    }
  }

  bool shuffles_;
  bool winograd_ = false;
  int64_t cout_ = 0, cin_ = 0;
  PackedFloats weights_, bias_;
};

}  // namespace

std::unique_ptr<Operator> make_conv3x3(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Conv3x3>(layer, kernels, weights);
}

}  // namespace esr
