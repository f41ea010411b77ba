// What the engine knows of a layer: one object per layer of a compiled plan.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../common/layout.h"
#include "../common/plan.h"
#include "convolution.h"
#include "packing.h"

namespace esr::cuda {

// Sizes are 0 while a plan is compiled, before they are known.
struct Shape {
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
};

// A value of a running plan. The normalisation, where there is one, is still to be applied by the reader.
struct Map {
  View view;
  Shape shape;
  const float* shift = nullptr;
  const float* scale = nullptr;
};

// One layer's work. Launches go to `stream` in order.
struct Run {
  std::vector<Map> inputs;
  Map output;
  const unsigned char* packed = nullptr;  // Step::packed_bytes()
  unsigned char* temporary = nullptr;     // Step::temporary_bytes()
  int64_t batch = 0;
  device::Stream stream = {};
  bool overlap = false;  // false only for the first launch of a run, which follows work of others
};

// Three layers' work in one launch, where Step::starts_block() says that it can be done so.
struct Block {
  Map input, output;
  View middle;                     // the first layer's result; data null: not wanted
  const unsigned char* packed[3];  // of each layer
  int64_t batch;
  device::Stream stream;
  bool overlap;
};

// What a step is in a launch of many layers: in order, one or two of them.
struct ChainStage {
  Packing packing;
  int64_t packed_at;  // in the step's packed bytes
  Activation activation;
  float slope;
  ResidualMode residual_mode;
};

using Weights = std::vector<WeightView>;
inline constexpr int64_t kAlignment = 256;  // of everything in a workspace

class Step {
 public:
  Step(const Layer& layer, Precision precision) : layer_(layer), precision_(precision) {}
  virtual ~Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  const Layer& layer() const { return layer_; }
  // The result's shape; checks the inputs'.
  virtual Shape result(const std::vector<Shape>& inputs) const = 0;
  virtual int64_t packed_bytes() const { return 0; }
  // Folds and packs the plan's weights into `packed`, kAlignment-aligned.
  virtual void pack(const Weights&, unsigned char*, device::Stream) const {}
  virtual int64_t temporary_bytes(const std::vector<Shape>&, int64_t) const { return 0; }
  virtual void run(const Run& run) const = 0;
  // How it computes, where that is not the usual way.
  virtual std::string way() const { return ""; }
  // Whether this layer can do the work of the one that alone reads its result; if so it does from now on.
  virtual bool take_over(const Step&) { return false; }
  // Whether one launch can do the work of this layer and of two more that each read the one before, the last one also
  // this layer's input: SPAN's block.
  virtual bool starts_block(const Step&, const Step&) const { return false; }
  virtual void run_block(const Block&) const {}
  // Its part of a chain (chain.h), the first layer with its residual, if it has one; empty: it cannot be in one.
  virtual std::vector<ChainStage> chain_stages() const { return {}; }

 protected:
  // The layer's k-th weight, which must have this shape (-1: any); data null where the layer has none.
  WeightView weight_of(size_t k, const Weights& weights, const char* what, const std::vector<int64_t>& shape) const;
  void check_channels(const Shape& s, int64_t channels, const char* what) const {
    STD_TORCH_CHECK(s.channels == channels, layer_.name(), ": ", what, " has ", s.channels, " channels, must have ",
                    channels);
  }
  void check_same_size(const Shape& a, const Shape& b, const char* what) const {
    STD_TORCH_CHECK(a.height == b.height && a.width == b.width, layer_.name(), ": ", what, " is ", b.height, "x",
                    b.width, ", must be ", a.height, "x", a.width);
  }

  Layer layer_;
  Precision precision_;
};

// The blocked map of an internal value at `data`.
View blocked_view(unsigned char* data, Precision precision, const Shape& shape);
int64_t blocked_bytes(Precision precision, const Shape& shape, int64_t batch);

using Shapes = std::vector<Shape>;  // of a layer's inputs

std::unique_ptr<Step> make_table(const Layer&, Precision);
// `network`: weights are packed once for many runs.
std::unique_ptr<Step> make_convolution(const Layer&, Precision, const Weights&, const Shapes&, bool network);
std::unique_ptr<Step> make_esa(const Layer&, Precision, const Weights&, const Shapes&);
// add, multiply, slice, resize, adaptive_max_pool, modulate and statistic.
std::unique_ptr<Step> make_weightless(const Layer&, Precision);
// depthwise_conv and layer_norm2d.
std::unique_ptr<Step> make_channelwise(const Layer&, Precision, const Weights&, const Shapes&);

}  // namespace esr::cuda
