#include <torch/csrc/stable/ops.h>

#include "backward.h"
#include "capability.h"
#include "direct.h"

namespace esr {
namespace {

using torch::stable::Tensor;

AdaptiveMaxPoolArgs pooling(const Shape& in, const Shape& out) {
  AdaptiveMaxPoolArgs a;
  a.channels = in.channels;
  a.height = in.height;
  a.width = in.width;
  a.out_height = out.height;
  a.out_width = out.width;
  return a;
}

// The result's shape, which the caller has chosen.
Shape pooled_shape(const char* name, const Batch& pooled, const Shape& in) {
  STD_TORCH_CHECK(pooled.shape.channels == in.channels && pooled.shape.height > 0 && pooled.shape.width > 0, name,
                  ": the result has ", pooled.shape.channels, " channels of ", pooled.shape.height, "x",
                  pooled.shape.width, " pixels, must have those of x and at least one pixel");
  return pooled.shape;
}

// A layer of a plan: as many pixels a side as `divisor` goes into it.
class AdaptiveMaxPool final : public Operator {
 public:
  using Operator::Operator;

  Shape result(const std::vector<Shape>& in) const override {
    const Shape out{in[0].channels, in[0].height / layer_.divisor, in[0].width / layer_.divisor};
    const bool empty = in[0].height == 0 || in[0].width == 0;
    STD_TORCH_CHECK(empty || (out.height > 0 && out.width > 0), layer_.name(), ": x is ", in[0].height, "x",
                    in[0].width, ", must have at least ", layer_.divisor, " pixels a side");
    return out;
  }

  bool reads_view(size_t) const override { return true; }

  void run(const Run& run) const override {
    const MapLayout &in = run.inputs[0].layout, &out = run.output.layout;
    AdaptiveMaxPoolArgs a = pooling({out.channels, in.height, in.width}, {out.channels, out.height, out.width});
    a.in = run.inputs[0].view();
    a.out = run.output.view();
    const int64_t cost = ceil_div(in.height, out.height) * in.width * out.step;
    parallel_ranges(out.height, cost, [&](int64_t y0, int64_t y1) {
      if (out.channels < out.step) {
        for (int64_t y = y0; y < y1; ++y) {
          float* const row = run.output.pixels() + y * out.pitch;
          for (int64_t x = 0; x < out.width; ++x)
            std::fill_n(row + (x + 1) * out.step - kernels_.lanes, kernels_.lanes, 0.0f);
        }
      }
      kernels_.adaptive_max_pool_pixels(a, y0, y1);
      complete_rows(kernels_, run, y0, y1);
    });
  }
};

}  // namespace

std::unique_ptr<Operator> make_adaptive_max_pool(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<AdaptiveMaxPool>(layer, kernels);
}

void adaptive_max_pool(const Tensor& x, const Tensor& out) {
  constexpr const char* kName = "adaptive_max_pool";
  const Kernels& kernels = active_kernels();
  const std::vector<Tensor> results{out};
  Gradients t(kName, results, 1);
  const Batch in = t.read(x, "x");
  const Shape shape = pooled_shape(kName, t.read(out, "the result"), in.shape);
  const Batch to = t.target(0, "the result", shape);
  if (in.images == 0) return;
  const bool planar = in.is_planar();
  STD_TORCH_CHECK(to.can_be(planar), kName, ": the result has another memory format than x");
  const AdaptiveMaxPoolArgs a = pooling(in.shape, shape);
  // A row of one channel, or a row of all.
  const int64_t rows = shape.height * (planar ? shape.channels : 1);
  const int64_t cost = ceil_div(in.shape.height, shape.height) * in.shape.width * (planar ? 1 : shape.channels);
  const auto kernel = planar ? kernels.adaptive_max_pool_planes : kernels.adaptive_max_pool_pixels;
  const int64_t floats = planar ? kernels.adaptive_max_pool_planes_floats(a) : 0;
  parallel_ranges(in.images * rows, cost, [&](int64_t first, int64_t last) {
    const Workspace scratch(floats);
    AdaptiveMaxPoolArgs mine = a;
    mine.scratch = scratch.data();
    for_image_rows(rows, first, last, [&](int64_t n, int64_t row0, int64_t row1) {
      mine.in = in.image(n);
      mine.out = to.image(n);
      kernel(mine, row0, row1);
    });
  });
}

void adaptive_max_pool_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "adaptive_max_pool_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, 1);
  const Batch in = t.read(x, "x");
  const Batch g = t.read(grad, "grad");
  const Batch to_x = t.target(0, "the gradient to x", in.shape);
  if (!t.wants(0)) return;
  AdaptiveMaxPoolGradientArgs a;
  a.pool = pooling(in.shape, pooled_shape(kName, g, in.shape));
  const bool planar = in.is_planar();
  STD_TORCH_CHECK(g.can_be(planar) && to_x.can_be(planar), kName, ": the gradients have another memory format than x");
  Tensor zeros = gradients[0];  // kernels add to it
  torch::stable::zero_(zeros);
  const int64_t width = planar ? 1 : kDepthwiseGroup, groups = ceil_div(in.shape.channels, width);
  const int64_t floats = planar ? kernels.adaptive_max_pool_planes_floats(a.pool) : 0;
  // Windows overlap, so that no two threads may have the same channel.
  parallel_ranges(in.images * groups, in.shape.height * in.shape.width * width, [&](int64_t first, int64_t last) {
    const Workspace scratch(floats);
    AdaptiveMaxPoolGradientArgs mine = a;
    mine.pool.scratch = scratch.data();
    for (int64_t k = first; k < last; ++k) {
      const int64_t n = k / groups, channel = k % groups * width;
      mine.pool.in = in.image(n);
      mine.grad = g.image(n);
      mine.to_x = to_x.image(n);
      if (planar) {
        kernels.adaptive_max_pool_plane_gradient(mine, channel);
      } else {
        kernels.adaptive_max_pool_pixels_gradient(mine, channel, std::min(width, in.shape.channels - channel));
      }
    }
  });
}

}  // namespace esr
