#include "esa_backward.h"

#include <cstring>

#include "backward.h"
#include "capability.h"

namespace esr {
namespace {

using torch::stable::Tensor;

// Positions among the weights; a bias follows its weight, and the gradient to x comes before all gradients.
enum Position : size_t { kW1 = 0, kW2 = 2, kW3 = 4, kW4 = 6, kWf = 8, kWmax = 10, kW3b = 12, kCount = 14 };
constexpr const char* kNames[kCount] = {"w1", "b1", "w2", "b2",    "w3",    "b3",  "w4",
                                        "b4", "wf", "bf", "w_max", "b_max", "w3_", "b3_"};
constexpr int64_t kSmallestSide = 15;

// The 3x3 convolutions at the lowest resolution.
struct Low {
  size_t position;
  Dense3x3 forward, backward;
};

void zero(const Map& map) { std::memset(map.ring, 0, static_cast<size_t>(map.layout.floats()) * sizeof(float)); }

// [9 * mid, mid, 1, 1]: what each position of a strided convolution's result hands back to the nine it saw.
Weight by_tap(const Weight& w) {
  const int64_t cout = w.shape[0], cin = w.shape[1];
  Weight a;
  a.shape = {9 * cin, cout, 1, 1};
  a.values.resize(w.values.size());
  for (int64_t t = 0; t < 9; ++t) {
    for (int64_t i = 0; i < cin; ++i) {
      for (int64_t o = 0; o < cout; ++o) a.values[(t * cin + i) * cout + o] = w.values[(o * cin + i) * 9 + t];
    }
  }
  return a;
}

class EsaBackward {
 public:
  EsaBackward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights,
              const std::vector<Tensor>& gradients)
      : t_("esa_backward", gradients, kCount + 1), kernels_(active_kernels()) {
    STD_TORCH_CHECK(weights.size() == kCount, "esa_backward: ", weights.size(), " weights given, must be ",
                    static_cast<size_t>(kCount));
    in_ = t_.read(x, "x");
    STD_TORCH_CHECK(in_.shape.height >= kSmallestSide && in_.shape.width >= kSmallestSide, "esa_backward: x is ",
                    in_.shape.height, "x", in_.shape.width, ", ESA needs ", kSmallestSide, " pixels a side");
    grad_ = t_.read(grad, "grad", in_.shape);
    to_x_ = t_.target(0, "the gradient to x", in_.shape);
    channels_ = in_.shape.channels;
    const Weight w1 = t_.weight(weights[kW1], "w1", {-1, channels_, 1, 1});
    mid_ = w1.shape[0];
    has_skip_ = weights[kWf].numel() > 0;
    has_three_ = weights[kWmax].numel() > 0;

    wants_x_ = t_.wants(0);
    to_c1_ = wants_x_ || wants(kW1);
    to_c2_ = to_c1_ || wants(kW2);
    to_low_ = to_c2_ || wants(kW3) || wants(kWmax) || wants(kW3b);
    to_sum_ = to_low_ || wants(kWf);
    any_ = to_sum_ || wants(kW4);
    if (!any_) return;

    const auto bias = [&](size_t w) {
      const Tensor& b = weights[w + 1];
      return t_.bias(b.numel() > 0 ? std::optional<Tensor>(b) : std::nullopt, kNames[w + 1],
                     w == kW4 ? channels_ : mid_);
    };
    conv1_ = Dense1x1(w1, data_or_null(bias(kW1)), kernels_);
    if (wants_x_) conv1_back_ = Dense1x1(adjoint(w1), nullptr, kernels_);
    const Weight w2 = t_.weight(weights[kW2], "w2", {mid_, mid_, 3, 3});
    w2_ = pack_conv3x3(w2, kernels_.lanes);
    b2_ = pack_vector(data_or_null(bias(kW2)), mid_, kernels_.lanes);
    if (to_c1_) conv2_back_ = Dense1x1(by_tap(w2), nullptr, kernels_);
    const Weight w4 = t_.weight(weights[kW4], "w4", {channels_, mid_, 1, 1});
    w4_ = pack_conv1x1(w4, kernels_.lanes);
    b4_ = pack_vector(data_or_null(bias(kW4)), channels_, kernels_.lanes);
    if (to_sum_) conv4_back_ = Dense1x1(adjoint(w4), nullptr, kernels_);
    if (has_skip_) {
      const Weight wf = t_.weight(weights[kWf], "wf", {mid_, mid_, 1, 1});
      wf_ = pack_conv1x1(wf, kernels_.lanes);
      bf_ = pack_vector(data_or_null(bias(kWf)), mid_, kernels_.lanes);
      if (to_c1_) skip_back_ = Dense1x1(adjoint(wf), nullptr, kernels_);
    }
    const auto low = [&](size_t position) {
      const Weight w = t_.weight(weights[position], kNames[position], {mid_, mid_, 3, 3});
      low_.push_back({position, Dense3x3(w, data_or_null(bias(position)), kernels_),
                      to_low_ ? Dense3x3(adjoint(w), nullptr, kernels_) : Dense3x3()});
    };
    if (has_three_) low(kWmax);
    low(kW3);
    if (has_three_) low(kW3b);

    const Shape& s = in_.shape;
    const int64_t h2 = (s.height - 3) / 2 + 1, w2s = (s.width - 3) / 2 + 1;
    const int64_t h3 = (h2 - 7) / 3 + 1, w3s = (w2s - 7) / 3 + 1;
    image_ = layout_for(kernels_, s);
    full_ = layout_for(kernels_, {mid_, s.height, s.width});
    strided_ = layout_for(kernels_, {mid_, h2, w2s});
    pooled_ = layout_for(kernels_, {mid_, h3, w3s});
    const auto sums = [&](size_t w, const WeightSums::Filter& filter) {
      const int64_t cin = w == kW1 ? channels_ : mid_, cout = w == kW4 ? channels_ : mid_;
      sums_.emplace_back(kernels_, filter, cin, cout, t_.images(), t_.wants(w + 1), t_.wants(w + 2));
    };
    const WeightSums::Filter dense{3, 1, use_winograd(mid_, mid_)};
    sums(kW1, {1, 1, false});
    sums(kW2, {3, 2, false});
    sums(kW3, dense);
    sums(kW4, {1, 1, false});
    sums(kWf, {1, 1, false});
    sums(kWmax, dense);
    sums(kW3b, dense);
  }

  void run() {
    if (!any_) return;
    for_images(t_.images(), [&](int64_t n) { image(n); });
    for (size_t w = 0; w < kCount; w += 2) {
      if (t_.wants(w + 1)) t_.write(w + 1, kNames[w], sums_[w / 2].weight());
      if (t_.wants(w + 2)) t_.write(w + 2, kNames[w + 1], sums_[w / 2].bias());
    }
  }

 private:
  bool wants(size_t w) const { return t_.wants(w + 1) || t_.wants(w + 2); }

  void image(int64_t n) {
    const Maps maps(
        {image_, image_, image_, full_, full_, full_, strided_, strided_, pooled_, pooled_, pooled_, pooled_, pooled_});
    const Map &x = maps[0], &g = maps[1], &to_z = maps[2], &c1 = maps[3], &sum = maps[4], &to_sum = maps[5];
    const Map &c2 = maps[6], &to_c2 = maps[7];
    // The pooled map, then the result of each low convolution (activated, but the last), then a gradient's other place.
    const Map* low = &maps[8];

    import_map(kernels_, in_.image(n), x);
    for_strips(full_.height, conv1_.row_cost(full_.width), [&](int64_t y0, int64_t y1) {
      conv1_.convolve({x}, {}, c1.pixels() + y0 * full_.pitch, full_.pitch, y0, y1);
    });
    stride(c1, c2);
    pool(c2, low[0]);
    for (size_t k = 0; k < low_.size(); ++k) {
      Epilogue relu;
      if (k + 1 < low_.size()) relu.activation = Activation::kRelu;
      convolve(low_[k].forward, low[k], relu, low[k + 1]);
    }
    for (int64_t k = 0; k < 3 + static_cast<int64_t>(low_.size()); ++k) count_pass(Pass::kAgain);

    import_map(kernels_, grad_.image(n), g);
    gate(x, c1, low[low_.size()], sum, g, to_z);
    sums_[kW4 / 2].add(n, sum, sum.pixels(), to_z);
    if (!to_sum_) return;
    for_strips(full_.height, conv4_back_.row_cost(full_.width), [&](int64_t y0, int64_t y1) {
      conv4_back_.convolve({to_z}, {}, to_sum.pixels() + y0 * full_.pitch, full_.pitch, y0, y1);
    });
    count_pass(Pass::kData);
    if (has_skip_) sums_[kWf / 2].add(n, c1, c1.pixels(), to_sum);
    if (!to_low_) return;

    // Down to the lowest resolution and up again to c1, whose gradient takes the place of `sum`.
    Map to_low = low[low_.size()], other = low[low_.size() + 1];
    shrink(to_sum, to_low);
    for (size_t k = low_.size(); k-- > 0;) {
      sums_[low_[k].position / 2].add(n, low[k], low[k].ring, to_low);
      if (!needs_below(k)) return;
      convolve(low_[k].backward, to_low, {}, other);
      count_pass(Pass::kData);
      if (k > 0) {
        DerivativeArgs relu;
        relu.activation = Activation::kRelu;
        for (int64_t y = 0; y < pooled_.height; ++y) {
          relu.h = low[k].pixels() + y * pooled_.pitch;
          relu.out = other.pixels() + y * pooled_.pitch;
          relu.grad = relu.out;
          relu.floats = pooled_.width * pooled_.step;
          kernels_.derivative(relu);
        }
      }
      std::swap(to_low, other);
    }
    zero(to_c2);
    kernels_.max_pool_gradient({c2.pixels(), strided_.pitch, to_low.pixels(), pooled_.pitch, to_c2.pixels(),
                                strided_.pitch, pooled_.step, pooled_.height, pooled_.width});
    sums_[kW2 / 2].add(n, c1, c1.pixels(), to_c2);
    if (!to_c1_) return;
    const Map& to_c1 = has_skip_ ? sum : to_sum;
    if (has_skip_) {
      for_strips(full_.height, skip_back_.row_cost(full_.width), [&](int64_t y0, int64_t y1) {
        skip_back_.convolve({to_sum}, {}, to_c1.pixels() + y0 * full_.pitch, full_.pitch, y0, y1);
      });
      count_pass(Pass::kData);
    }
    stride_back(to_c2, to_c1);
    sums_[kW1 / 2].add(n, x, x.pixels(), to_c1);
    if (!wants_x_) return;
    Epilogue direct;
    direct.mode = ResidualMode::kPost;
    direct.residual = g.pixels();
    direct.residual_pitch = image_.pitch;
    export_data_gradient(kernels_, conv1_back_, to_c1, direct, to_x_.image(n), channels_);
  }

  // Whether anything wants the gradient to what low convolution k reads.
  bool needs_below(size_t k) const {
    bool needed = to_c2_;
    for (size_t i = 0; i < k; ++i) needed = needed || wants(low_[i].position);
    return needed;
  }

  void stride(const Map& from, const Map& to) const {
    Conv3x3Args a;
    a.in = from.pixels();
    a.in_pitch = full_.pitch;
    a.in_step = full_.step;
    a.in_row_step = 2 * full_.pitch;
    a.in_pixel_step = 2 * full_.step;
    a.cin = mid_;
    a.out = to.pixels();
    a.out_pitch = strided_.pitch;
    a.out_step = strided_.step;
    a.width = strided_.width;
    a.out_vectors = strided_.step / kernels_.lanes;
    a.weights = w2_.data();
    a.bias = b2_.data();
    parallel_ranges(strided_.height, strided_.width * strided_.step * mid_ * 9,
                    [&](int64_t y0, int64_t y1) { kernels_.conv3x3(a, y0, y1); });
  }

  void pool(const Map& from, const Map& to) const {
    MaxPoolArgs a;
    a.in = from.pixels();
    a.in_pitch = strided_.pitch;
    a.out = to.pixels();
    a.out_pitch = pooled_.pitch;
    a.step = pooled_.step;
    a.width = pooled_.width;
    parallel_ranges(pooled_.height, pooled_.width * a.step * 49, [&](int64_t y0, int64_t y1) {
      kernels_.max_pool(a, y0, y1);
      zero_ring(to, y0, y1);
    });
  }

  static void convolve(const Dense3x3& conv, const Map& from, const Epilogue& epilogue, const Map& to) {
    conv.for_strips(from.layout, 0, [&](int64_t y0, int64_t y1, float*, float* scratch) {
      conv.convolve(from, epilogue, to.layout, to.pixels(), 0, scratch, y0, y1);
      zero_ring(to, y0, y1);
    });
  }

  void gate(const Map& x, const Map& c1, const Map& small, const Map& sum, const Map& g, const Map& to_z) const {
    EsaGateGradientArgs a;
    EsaGateArgs& e = a.gate;
    e.small = small.pixels();
    e.small_pitch = pooled_.pitch;
    e.small_height = pooled_.height;
    e.small_width = pooled_.width;
    e.c1 = c1.pixels();
    e.c1_pitch = full_.pitch;
    e.mid = mid_;
    e.mid_step = full_.step;
    if (has_skip_) {
      e.weights_f = wf_.data();
      e.bias_f = bf_.data();
    }
    e.weights_4 = w4_.data();
    e.bias_4 = b4_.data();
    e.x = x.pixels();
    e.x_pitch = image_.pitch;
    e.x_step = image_.step;
    e.height = image_.height;
    e.width = image_.width;
    a.sum = sum.pixels();
    a.sum_pitch = full_.pitch;
    a.grad = g.pixels();
    a.to_z = to_z.pixels();
    a.grad_pitch = a.to_z_pitch = image_.pitch;
    parallel_ranges(e.height, e.width * mid_ * (e.mid_step + e.x_step), [&](int64_t y0, int64_t y1) {
      const Workspace scratch((e.small_width + e.width) * e.mid_step);
      EsaGateGradientArgs mine = a;
      mine.gate.scratch = scratch.data();
      kernels_.esa_gate_gradient(mine, y0, y1);
    });
  }

  void shrink(const Map& from, const Map& to) const {
    const Workspace scratch(pooled_.width * pooled_.step);
    zero_ring(to, 0, pooled_.height);
    kernels_.shrink({from.pixels(), full_.pitch, full_.height, full_.width, to.pixels(), pooled_.pitch, pooled_.height,
                     pooled_.width, full_.step, scratch.data()});
  }

  // Adds what the strided convolution hands back: each row of c1 gathers from the rows that saw it.
  void stride_back(const Map& g, const Map& to) const {
    const int64_t taps = round_up(9 * mid_, kernels_.lanes), pitch = strided_.width * taps;
    const Workspace parts(strided_.height * pitch);
    // Channels of a tap need not start at a vector: they are added by themselves.
    for_strips(strided_.height, conv2_back_.row_cost(strided_.width), [&](int64_t y0, int64_t y1) {
      conv2_back_.convolve({g}, {}, parts.data() + y0 * pitch, pitch, y0, y1);
    });
    parallel_ranges(full_.height, full_.width * full_.step * 4, [&](int64_t y0, int64_t y1) {
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t ky = y % 2; ky < 3; ky += 2) {
          const int64_t oy = (y - ky) / 2;
          if (y < ky || oy >= strided_.height) continue;
          for (int64_t kx = 0; kx < 3; ++kx) {
            for (int64_t ox = 0; ox < strided_.width; ++ox) {
              const float* from = parts.data() + oy * pitch + ox * taps + (ky * 3 + kx) * mid_;
              float* pixel = to.pixels() + y * full_.pitch + (2 * ox + kx) * full_.step;
              for (int64_t c = 0; c < mid_; ++c) pixel[c] += from[c];
            }
          }
        }
      }
    });
    count_pass(Pass::kData);
  }

  Gradients t_;
  const Kernels& kernels_;
  Batch in_, grad_, to_x_;
  int64_t channels_ = 0, mid_ = 0;
  bool has_skip_ = false, has_three_ = false;
  // What is wanted: gradients to x, to the maps on the way to it, or to anything.
  bool wants_x_ = false, to_c1_ = false, to_c2_ = false, to_low_ = false, to_sum_ = false, any_ = false;
  Dense1x1 conv1_, conv1_back_, conv2_back_, conv4_back_, skip_back_;
  PackedFloats w2_, b2_, w4_, b4_, wf_, bf_;
  std::vector<Low> low_;
  MapLayout image_, full_, strided_, pooled_;
  std::vector<WeightSums> sums_;  // by position / 2
};

}  // namespace

void esa_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& gradients) {
  EsaBackward(grad, x, weights, gradients).run();
}

}  // namespace esr
