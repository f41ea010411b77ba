#include "backward.h"
#include "capability.h"
#include "direct.h"

namespace esr {
namespace {

using torch::stable::Tensor;

// Where every pixel of a side of `size` comes from on a side of `from`, by PyTorch's rules.
class Side {
 public:
  Side(int64_t from, int64_t size, bool blend) : low_(size), high_(size), weight_(size) {
    const float scale = static_cast<float>(from) / static_cast<float>(size);
    for (int64_t i = 0; i < size; ++i) {
      float source = static_cast<float>(i) * scale;
      if (blend) source = std::max(0.0f, (static_cast<float>(i) + 0.5f) * scale - 0.5f);
      low_[i] = std::min(static_cast<int64_t>(source), from - 1);
      high_[i] = std::min(low_[i] + 1, from - 1);
      weight_[i] = std::min(source - static_cast<float>(low_[i]), 1.0f);
    }
  }
  ResizeTable table() const { return {low_.data(), high_.data(), weight_.data()}; }

 private:
  std::vector<int64_t> low_, high_;
  std::vector<float> weight_;
};

// Fills in how map m, of this size, is read; its tables are kept in `sides`, which has room for two of each map.
void set_map(ModulateArgs& args, int64_t m, int64_t height, int64_t width, std::vector<Side>& sides) {
  ModulateMapArgs& a = args.maps[m];
  a.height = height;
  a.width = width;
  a.resized = height != args.height || width != args.width;
  if (!a.resized) return;
  a.rows = sides.emplace_back(height, args.height, args.blend).table();
  a.columns = sides.emplace_back(width, args.width, args.blend).table();
}

// The arguments of a call and what they point to.
struct Modulation {
  ModulateArgs args;
  Batch x;
  std::vector<Batch> maps;
  std::vector<Side> sides;

  Modulation(Gradients& t, const char* name, const Tensor& input, const std::vector<Tensor>& given, bool bilinear,
             int64_t activation, double slope) {
    const DerivativeArgs epilogue = t.epilogue(activation, slope);
    x = t.read(input, "x");
    args.channels = x.shape.channels;
    args.height = x.shape.height;
    args.width = x.shape.width;
    args.planar = x.is_planar();
    args.blend = bilinear;
    args.activation = epilogue.activation;
    args.slope = epilogue.slope;
    args.count = static_cast<int64_t>(given.size());
    STD_TORCH_CHECK(args.count >= 1 && args.count <= kMostModulateMaps, name, ": ", args.count,
                    " maps given, must be 1 to ", kMostModulateMaps);
    sides.reserve(2 * given.size());
    for (size_t m = 0; m < given.size(); ++m) {
      const Batch map = t.read(given[m], "a map");
      const auto [channels, height, width] = map.shape;
      STD_TORCH_CHECK(channels == args.channels && height > 0 && width > 0, name, ": map ", m, " has ", channels,
                      " channels of ", height, "x", width, " pixels, must have those of x and at least one pixel");
      STD_TORCH_CHECK(map.can_be(args.planar), name, ": map ", m, " has another memory format than x");
      maps.push_back(map);
      set_map(args, static_cast<int64_t>(m), height, width, sides);
    }
  }

  // The arguments for image n.
  ModulateArgs image(int64_t n) const {
    ModulateArgs a = args;
    a.x = x.image(n);
    for (size_t m = 0; m < maps.size(); ++m) a.maps[m].map = maps[m].image(n);
    return a;
  }
};

// A layer of a plan.
class Modulate final : public Operator {
 public:
  using Operator::Operator;

  Shape result(const std::vector<Shape>& in) const override {
    for (size_t k = 1; k < in.size(); ++k) {
      if (in[0].channels >= 0) check_channels(in[k], in[0].channels, "a map");
    }
    return in[0];
  }

  bool overwrites(size_t k) const override { return k == 0; }

  void run(const Run& run) const override {
    const MapLayout& m = run.output.layout;
    ModulateArgs a;
    a.x = run.inputs[0].view();
    a.out = run.output.view();
    // The channels that fill up the last vector are zeros, and stay so.
    a.channels = a.step = m.step;
    a.height = m.height;
    a.width = m.width;
    a.planar = false;
    a.blend = layer_.resize == Resize::kBilinear;
    a.activation = layer_.activation;
    a.slope = layer_.slope;
    a.count = static_cast<int64_t>(run.inputs.size()) - 1;
    std::vector<Side> sides;
    sides.reserve(2 * run.inputs.size());
    for (int64_t k = 0; k < a.count; ++k) {
      const Map& map = run.inputs[static_cast<size_t>(k) + 1];
      a.maps[k].map = map.view();
      set_map(a, k, map.layout.height, map.layout.width, sides);
    }
    const int64_t floats = kernels_.modulate_floats(a);
    parallel_ranges(m.height, m.width * m.step * (8 + 2 * a.count), [&](int64_t y0, int64_t y1) {
      const Workspace scratch(floats);
      ModulateArgs mine = a;
      mine.scratch = scratch.data();
      kernels_.modulate_rows(mine, y0, y1);
      complete_rows(kernels_, run, y0, y1);
    });
  }
};

}  // namespace

std::unique_ptr<Operator> make_modulate(const Layer& layer, const Kernels& kernels) {
  return std::make_unique<Modulate>(layer, kernels);
}

void modulate(const Tensor& x, const std::vector<Tensor>& maps, bool bilinear, int64_t activation, double slope,
              const Tensor& out) {
  constexpr const char* kName = "modulate";
  const Kernels& kernels = active_kernels();
  const std::vector<Tensor> results{out};
  Gradients t(kName, results, 1);
  Modulation m(t, kName, x, maps, bilinear, activation, slope);
  const Batch to = t.target(0, "the result", m.x.shape);
  if (m.x.images == 0) return;
  STD_TORCH_CHECK(to.can_be(m.args.planar), kName, ": the result has another memory format than x");
  m.args.step = m.args.planar ? 1 : m.args.channels;
  const int64_t rows = m.args.height * (m.args.planar ? m.args.channels : 1);
  const int64_t floats = kernels.modulate_floats(m.args);
  parallel_ranges(m.x.images * rows, m.args.width * m.args.step * (8 + 2 * m.args.count),
                  [&](int64_t first, int64_t last) {
                    const Workspace scratch(floats);
                    for_image_rows(rows, first, last, [&](int64_t n, int64_t row0, int64_t row1) {
                      ModulateArgs mine = m.image(n);
                      mine.out = to.image(n);
                      mine.scratch = scratch.data();
                      kernels.modulate_rows(mine, row0, row1);
                    });
                  });
}

void modulate_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& maps, bool bilinear,
                       int64_t activation, double slope, const std::vector<Tensor>& gradients) {
  constexpr const char* kName = "modulate_backward";
  const Kernels& kernels = active_kernels();
  Gradients t(kName, gradients, maps.size() + 1);
  Modulation m(t, kName, x, maps, bilinear, activation, slope);
  const Batch g = t.read(grad, "grad", m.x.shape);
  std::vector<Batch> to{t.target(0, "the gradient to x", m.x.shape)};
  for (size_t k = 0; k < maps.size(); ++k) to.push_back(t.target(k + 1, "the gradient to a map", m.maps[k].shape));
  bool some = false, same = g.can_be(m.args.planar);
  for (size_t k = 0; k < to.size(); ++k) {
    some = some || t.wants(k);
    same = same && (!t.wants(k) || to[k].can_be(m.args.planar));
  }
  if (!some) return;
  STD_TORCH_CHECK(same, kName, ": the gradients have another memory format than x");
  // A thread has all rows of its channels, so that sums come out the same for any number of threads.
  const int64_t width = m.args.planar ? 1 : kDepthwiseGroup, groups = ceil_div(m.args.channels, width);
  m.args.step = std::min(width, m.args.channels);
  const int64_t floats = kernels.modulate_gradient_floats(m.args);
  parallel_ranges(m.x.images * groups, m.args.height * m.args.width * m.args.step * (16 + 4 * m.args.count),
                  [&](int64_t first, int64_t last) {
                    const Workspace scratch(floats);
                    for (int64_t k = first; k < last; ++k) {
                      const int64_t n = k / groups, channel = k % groups * width;
                      ModulateGradientArgs mine;
                      mine.forward = m.image(n);
                      mine.forward.step = std::min(width, m.args.channels - channel);
                      mine.forward.scratch = scratch.data();
                      mine.grad = g.image(n);
                      if (t.wants(0)) mine.to_x = to[0].image(n);
                      for (size_t i = 0; i < maps.size(); ++i) {
                        if (t.wants(i + 1)) mine.to_maps[i] = to[i + 1].image(n);
                      }
                      kernels.modulate_gradient(mine, channel);
                    }
                  });
}

}  // namespace esr
