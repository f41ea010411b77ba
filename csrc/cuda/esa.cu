// Enhanced spatial attention in three launches, in RFDN's form in five. Between the first 1x1 convolution and the 3x3
// convolution of stride 2 there is nothing, nor between it and the skip convolution; each pair is one convolution of x:
//
//     c2   = conv(x, w2 w1, stride 2)
//     low  = conv3x3(max_pool(c2, 7, stride 3), w3)      RFDN: with w_max, then relu, w3, relu, w3_
//     out  = x sigmoid(w4 (resize(low) + wf w1 x))
#include "esa.h"

#include "step.h"

namespace esr::cuda {
namespace {

enum WeightIndex : size_t { kW1, kB1, kW2, kB2, kW3, kB3, kW4, kB4, kWf, kBf, kWmax, kBmax, kW3b, kB3b };

constexpr int64_t kSmallestSide = 15;

// Regions of one block of memory, one after another.
class Regions {
 public:
  explicit Regions(unsigned char* base) : base_(base) {}
  unsigned char* take(int64_t bytes) {
    unsigned char* at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += round_up(bytes, kAlignment);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  int64_t bytes_ = 0;
};

class EsaStep : public Step {
 public:
  EsaStep(const Layer& layer, Precision precision, const Weights& weights, const Shapes& inputs)
      : Step(layer, precision), has_skip_(has(kWf)), has_three_(has(kWmax)) {
    const WeightView w1 = weight_of(kW1, weights, "w1", {-1, inputs[0].channels, 1, 1});
    hidden_ = w1.sizes[0];
    channels_ = w1.sizes[1];
    STD_TORCH_CHECK(hidden_ <= kMostHidden, layer.name(), ": w1 has ", hidden_, " output channels, allowed are 1..",
                    kMostHidden);
    const std::vector<int64_t> bias = {hidden_}, dense = {hidden_, hidden_, 3, 3};
    weight_of(kB1, weights, "b1", bias);
    weight_of(kW2, weights, "w2", dense);
    weight_of(kB2, weights, "b2", bias);
    weight_of(kW3, weights, "w3", dense);
    weight_of(kB3, weights, "b3", bias);
    weight_of(kW4, weights, "w4", {channels_, hidden_, 1, 1});
    weight_of(kB4, weights, "b4", {channels_});
    weight_of(kWf, weights, "wf", {hidden_, hidden_, 1, 1});
    weight_of(kBf, weights, "bf", bias);
    weight_of(kWmax, weights, "w_max", dense);
    weight_of(kBmax, weights, "b_max", bias);
    weight_of(kW3b, weights, "w3_", dense);
    weight_of(kB3b, weights, "b3_", bias);
    STD_TORCH_CHECK(has_three_ == has(kW3b), layer.name(), ": w_max and w3_ must be given together");
    reduce_ = plan_packing(precision, 9, &channels_, 1, hidden_, 2);
    if (has_three_) dense_ = plan_packing(precision, 9, &hidden_, 1, hidden_, 1);
    low_ = {hidden_};
    gate_ = plan_gate(precision, channels_, hidden_);
  }

  Shape result(const Shapes& inputs) const override {
    const Shape& x = inputs[0];
    check_channels(x, channels_, "x");
    const bool known = x.height > 0 && x.width > 0;
    STD_TORCH_CHECK(!known || (x.height >= kSmallestSide && x.width >= kSmallestSide), layer_.name(), ": x is ",
                    x.height, "x", x.width, ", ESA needs ", kSmallestSide, " pixels a side");
    return x;
  }

  int64_t packed_bytes() const override { return Packed(*this, nullptr).bytes; }

  void pack(const Weights& weights, unsigned char* packed, device::Stream stream) const override {
    const Packed to(*this, packed);
    const auto weight = [&](size_t k) {
      return has(k) ? weights[static_cast<size_t>(layer_.weights[k])] : WeightView{};
    };
    const auto convolution = [&](const Packing& packing, int32_t channels, size_t w, size_t b, bool folded,
                                 unsigned char* out) {
      PackArgs a = {};
      a.packing = packing;
      a.channels[0] = channels;
      a.maps = 1;
      a.weight = weight(w);
      a.bias = weight(b);
      if (folded) {
        a.composition = Composition::kProduct;
        a.inner = weight(kW1);
        a.inner_bias = weight(kB1);
      }
      a.out = out;
      launch_pack(a, stream);
    };
    convolution(reduce_, channels_, kW2, kB2, true, to.reduce);
    convolution(gate_.skip(), channels_, has_skip_ ? kWf : kW1, has_skip_ ? kBf : kB1, has_skip_, to.skip);
    if (has_three_) {
      convolution(dense_, hidden_, kW3, kB3, false, to.second);
      convolution(dense_, hidden_, kW3b, kB3b, false, to.third);
    }
    EsaPackArgs a = {};
    a.low = low_;
    a.gate = gate_;
    a.low_weight = weight(has_three_ ? kWmax : kW3);
    a.low_bias = weight(has_three_ ? kBmax : kB3);
    a.gate_weight = weight(kW4);
    a.gate_bias = weight(kB4);
    a.low_out = to.low;
    a.gate_out = to.last;
    launch_esa_pack(a, stream);
  }

  int64_t temporary_bytes(const Shapes& inputs, int64_t batch) const override {
    return Maps(*this, inputs[0], batch, nullptr).bytes;
  }

  void run(const Run& run) const override {
    const Map& x = run.inputs[0];
    const Packed packed(*this, run.packed);
    const Maps maps(*this, x.shape, run.batch, run.temporary);
    convolve(run, reduce_, packed.reduce, x, maps.reduced, 2, Activation::kNone, run.overlap);

    LowArgs low = {};
    low.in = maps.reduced.view;
    low.out = maps.low.view;
    low.weights = packed.low;
    low.hidden = hidden_;
    low.in_width = static_cast<int32_t>(maps.reduced.shape.width);
    low.height = static_cast<int32_t>(maps.low.shape.height);
    low.width = static_cast<int32_t>(maps.low.shape.width);
    low.relu = has_three_;
    launch_low(low, precision_, run.batch, run.stream, true);
    if (has_three_) {
      convolve(run, dense_, packed.second, maps.low, maps.other, 1, Activation::kRelu, true);
      convolve(run, dense_, packed.third, maps.other, maps.low, 1, Activation::kNone, true);
    }

    GateArgs gate = {};
    gate.x = x.view;
    gate.out = run.output.view;
    gate.low = maps.low.view;
    gate.skip = packed.skip;
    gate.last = packed.last;
    gate.height = static_cast<int32_t>(x.shape.height);
    gate.width = static_cast<int32_t>(x.shape.width);
    gate.low_height = low.height;
    gate.low_width = low.width;
    launch_gate(gate, gate_, run.batch, run.stream, true);
  }

 private:
  // Where the packed weights lie.
  struct Packed {
    unsigned char *reduce, *low, *second, *third, *skip, *last;
    int64_t bytes;

    Packed(const EsaStep& e, const unsigned char* base) {
      Regions regions(const_cast<unsigned char*>(base));
      reduce = regions.take(e.reduce_.bytes());
      low = regions.take(e.low_.bytes());
      second = regions.take(e.has_three_ ? e.dense_.bytes() : 0);
      third = regions.take(e.has_three_ ? e.dense_.bytes() : 0);
      skip = regions.take(e.gate_.skip().bytes());
      last = regions.take(e.gate_.bytes());
      bytes = regions.bytes();
    }
  };

  // The maps between the launches.
  struct Maps {
    Map reduced, low, other;  // other: RFDN's form only
    int64_t bytes;

    Maps(const EsaStep& e, const Shape& x, int64_t batch, unsigned char* base) {
      Regions regions(base);
      const auto place = [&](const Shape& shape) {
        Map map;
        map.shape = shape;
        map.view = blocked_view(regions.take(blocked_bytes(e.precision_, shape, batch)), e.precision_, shape);
        return map;
      };
      const Shape s{e.hidden_, (x.height - 3) / 2 + 1, (x.width - 3) / 2 + 1};
      const Shape pooled{e.hidden_, (s.height - kPool) / kPoolStride + 1, (s.width - kPool) / kPoolStride + 1};
      reduced = place(s);
      low = place(pooled);
      if (e.has_three_) other = place(pooled);
      bytes = regions.bytes();
    }
  };

  bool has(size_t k) const { return layer_.weights[k] >= 0; }

  void convolve(const Run& run, const Packing& packing, const unsigned char* weights, const Map& in, const Map& out,
                int32_t stride, Activation activation, bool overlap) const {
    Convolution c;
    c.packing = packing;
    ConvolutionArgs& a = c.args;
    a.inputs[0] = in.view;
    a.output = out.view;
    a.weights = weights;
    a.bias = reinterpret_cast<const float*>(weights + packing.weight_bytes());
    a.stride = stride;
    a.padding = stride == 1 ? 1 : 0;
    a.height = static_cast<int32_t>(in.shape.height);
    a.width = static_cast<int32_t>(in.shape.width);
    a.out_height = static_cast<int32_t>(out.shape.height);
    a.out_width = static_cast<int32_t>(out.shape.width);
    a.shuffle = 1;
    a.activation = activation;
    prepare_convolution(c, run.batch);
    launch_convolution(c, run.stream, overlap);
  }

  const bool has_skip_, has_three_;
  int32_t channels_ = 0, hidden_ = 0;
  Packing reduce_, dense_;
  LowWeights low_;
  GateWeights gate_;
};

}  // namespace

std::unique_ptr<Step> make_esa(const Layer& layer, Precision precision, const Weights& weights, const Shapes& inputs) {
  return std::make_unique<EsaStep>(layer, precision, weights, inputs);
}

}  // namespace esr::cuda
