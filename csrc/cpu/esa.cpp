#include "operator.h"

namespace esr {
namespace {

enum WeightIndex : size_t { kW1, kB1, kW2, kB2, kW3, kB3, kW4, kB4, kWf, kBf, kWmax, kBmax, kW3b, kB3b };

constexpr int64_t kSmallestSide = 15;

// Enhanced spatial attention. The attention is computed at about a sixth of the size; the last pass enlarges it, adds
// the skip, and gates x, row by row.
class Esa final : public Operator {
 public:
  Esa(const Layer& layer, const Kernels& kernels, const Weights& weights) : Operator(layer, kernels) {
    const Weight& w1 = weight_of(layer, kW1, weights, "w1", {-1, -1, 1, 1});
    mid_ = w1.shape[0];
    channels_ = w1.shape[1];
    w1_ = pack_conv1x1(w1, kernels.lanes);
    b1_ = bias_of(layer, kB1, weights, "b1", mid_, kernels.lanes);
    conv2_ = dense(layer, kW2, kB2, weights, "w2", "b2");
    conv3_ = dense(layer, kW3, kB3, weights, "w3", "b3");
    w4_ = pack_conv1x1(weight_of(layer, kW4, weights, "w4", {channels_, mid_, 1, 1}), kernels.lanes);
    b4_ = bias_of(layer, kB4, weights, "b4", channels_, kernels.lanes);
    has_skip_convolution_ = layer.weights[kWf] >= 0;
    if (has_skip_convolution_) {
      wf_ = pack_conv1x1(weight_of(layer, kWf, weights, "wf", {mid_, mid_, 1, 1}), kernels.lanes);
      bf_ = bias_of(layer, kBf, weights, "bf", mid_, kernels.lanes);
    }
    has_three_ = layer.weights[kWmax] >= 0;
    if (has_three_) {
      conv_max_ = dense(layer, kWmax, kBmax, weights, "w_max", "b_max");
      conv3b_ = dense(layer, kW3b, kB3b, weights, "w3_", "b3_");
    }
  }

  Shape result(const std::vector<Shape>& in) const override {
    check_channels(in[0], channels_, "x");
    const bool known = in[0].height > 0 && in[0].width > 0;
    STD_TORCH_CHECK(!known || (in[0].height >= kSmallestSide && in[0].width >= kSmallestSide), layer_.name(), ": x is ",
                    in[0].height, "x", in[0].width, ", ESA needs ", kSmallestSide, " pixels a side");
    return {channels_, in[0].height, in[0].width};
  }

  int64_t temporary_floats(const std::vector<Shape>& in) const override {
    const Sizes s(*this, in[0].height, in[0].width);
    return s.c1.floats() + s.strided.floats() + 2 * s.pooled.floats();
  }

  bool overwrites(size_t) const override { return true; }

  void run(const Run& run) const override {
    const Map& x = run.inputs[0];
    const Sizes s(*this, x.layout.height, x.layout.width);
    Map c1, strided, a, b;
    float* free = run.temporary;
    const auto place = [&](Map& map, const MapLayout& layout) {
      map.ring = free;
      map.layout = layout;
      free += layout.floats();
    };
    place(c1, s.c1);
    place(strided, s.strided);
    place(a, s.pooled);
    place(b, s.pooled);

    reduce(x, c1);
    convolve(conv2_, c1, c1.pixels(), 2, Activation::kNone, strided);
    pool(strided, a);
    if (has_three_) {
      convolve(conv_max_, a, a.ring, 1, Activation::kRelu, b);
      convolve(conv3_, b, b.ring, 1, Activation::kRelu, a);
      convolve(conv3b_, a, a.ring, 1, Activation::kNone, b);
    } else {
      convolve(conv3_, a, a.ring, 1, Activation::kNone, b);
    }
    gate(run, c1, b);
  }

 private:
  struct Dense {
    PackedFloats weights, bias;
  };

  struct Sizes {
    MapLayout c1, strided, pooled;

    Sizes(const Esa& esa, int64_t height, int64_t width) {
      const int64_t h2 = (height - 3) / 2 + 1, w2 = (width - 3) / 2 + 1, lanes = esa.kernels_.lanes;
      c1 = MapLayout::make(esa.mid_, height, width, lanes);
      strided = MapLayout::make(esa.mid_, h2, w2, lanes);
      pooled = MapLayout::make(esa.mid_, (h2 - 7) / 3 + 1, (w2 - 7) / 3 + 1, lanes);
    }
  };

  Dense dense(const Layer& layer, size_t w, size_t b, const Weights& weights, const char* w_name,
              const char* b_name) const {
    return {pack_conv3x3(weight_of(layer, w, weights, w_name, {mid_, mid_, 3, 3}), kernels_.lanes),
            bias_of(layer, b, weights, b_name, mid_, kernels_.lanes)};
  }

  void reduce(const Map& x, const Map& c1) const {
    Conv1x1Args a;
    a.inputs = 1;
    a.in[0] = x.pixels();
    a.in_pitch[0] = x.layout.pitch;
    a.in_step[0] = x.layout.step;
    a.cin[0] = channels_;
    a.out = c1.pixels();
    a.out_pitch = c1.layout.pitch;
    a.out_step = c1.layout.step;
    a.width = c1.layout.width;
    a.out_vectors = c1.layout.step / kernels_.lanes;
    a.weights = w1_.data();
    a.bias = b1_.data();
    parallel_ranges(c1.layout.height, c1.layout.width * c1.layout.step * channels_,
                    [&](int64_t y0, int64_t y1) { kernels_.conv1x1(a, y0, y1); });
  }

  // `first` is the pixel under the filter's corner for output pixel (0, 0).
  void convolve(const Dense& dense, const Map& in, const float* first, int64_t stride, Activation activation,
                const Map& out) const {
    const MapLayout& m = out.layout;
    Conv3x3Args a;
    a.in = first;
    a.in_pitch = in.layout.pitch;
    a.in_step = in.layout.step;
    a.in_row_step = stride * in.layout.pitch;
    a.in_pixel_step = stride * in.layout.step;
    a.cin = mid_;
    a.out = out.pixels();
    a.out_pitch = m.pitch;
    a.out_step = m.step;
    a.width = m.width;
    a.out_vectors = m.step / kernels_.lanes;
    a.weights = dense.weights.data();
    a.bias = dense.bias.data();
    a.epilogue.activation = activation;
    parallel_ranges(m.height, m.width * m.step * mid_ * 9, [&](int64_t y0, int64_t y1) {
      kernels_.conv3x3(a, y0, y1);
      zero_ring(out, y0, y1);
    });
  }

  void pool(const Map& in, const Map& out) const {
    MaxPoolArgs a;
    a.in = in.pixels();
    a.in_pitch = in.layout.pitch;
    a.out = out.pixels();
    a.out_pitch = out.layout.pitch;
    a.step = out.layout.step;
    a.width = out.layout.width;
    parallel_ranges(out.layout.height, out.layout.width * a.step * 49, [&](int64_t y0, int64_t y1) {
      kernels_.max_pool(a, y0, y1);
      zero_ring(out, y0, y1);
    });
  }

  void gate(const Run& run, const Map& c1, const Map& small) const {
    const Map& x = run.inputs[0];
    EsaGateArgs a;
    a.small = small.pixels();
    a.small_pitch = small.layout.pitch;
    a.small_height = small.layout.height;
    a.small_width = small.layout.width;
    a.c1 = c1.pixels();
    a.c1_pitch = c1.layout.pitch;
    a.mid = mid_;
    a.mid_step = c1.layout.step;
    if (has_skip_convolution_) {
      a.weights_f = wf_.data();
      a.bias_f = bf_.data();
    }
    a.weights_4 = w4_.data();
    a.bias_4 = b4_.data();
    a.x = x.pixels();
    a.x_pitch = x.layout.pitch;
    a.x_step = x.layout.step;
    a.out = run.output.pixels();
    a.out_pitch = run.output.layout.pitch;
    a.height = x.layout.height;
    a.width = x.layout.width;
    const int64_t cost = a.width * mid_ * (a.mid_step + a.x_step);
    parallel_ranges(a.height, cost, [&](int64_t y0, int64_t y1) {
      const Workspace scratch((a.small_width + 2 * a.width) * a.mid_step);
      EsaGateArgs mine = a;
      mine.scratch = scratch.data();
      kernels_.esa_gate(mine, y0, y1);
      complete_rows(kernels_, run, y0, y1);
    });
  }

  int64_t mid_ = 0, channels_ = 0;
  bool has_skip_convolution_ = false, has_three_ = false;
  PackedFloats w1_, b1_, w4_, b4_, wf_, bf_;
  Dense conv2_, conv3_, conv_max_, conv3b_;
};

}  // namespace

std::unique_ptr<Operator> make_esa(const Layer& layer, const Kernels& kernels, const Weights& weights) {
  return std::make_unique<Esa>(layer, kernels, weights);
}

}  // namespace esr
