#include "sequence.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "pointwise.h"

namespace esr::cuda {

using device::AllowedMemory;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor Sequence::allocate(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// The memory of all maps comes first, behind it the temporary one, which launches in order can share.
void Sequence::start(Phase phase, const Tensor& packed, const Tensor& workspace, AllowedMemory& packed_memory,
                     AllowedMemory& memory) {
  phase_ = phase;
  first_ = true;
  packed_ = static_cast<unsigned char*>(packed.mutable_data_ptr());
  workspace_ = static_cast<unsigned char*>(workspace.mutable_data_ptr());
  packed_memory.add(packed_, packed_bytes_, phase == Phase::kPack, "the packed weights");
  if (phase == Phase::kRun) memory.add(workspace_, bytes(), true, "the workspace");
  packed_bytes_ = used_ = 0;
}

unsigned char* Sequence::take(int64_t bytes) {
  unsigned char* p = workspace_ + used_;
  used_ += round_up(bytes, kAlignment);
  return p;
}

unsigned char* Sequence::temporary(int64_t bytes) {
  temporary_bytes_ = std::max(temporary_bytes_, bytes);
  return workspace_ + used_;
}

Map Sequence::map(const Shape& shape) {
  return {blocked_view(take(blocked_bytes(precision_, shape, batch_)), precision_, shape), shape};
}

void Sequence::copy(const View& from, const Map& to, int32_t shuffle) {
  launch([&](device::Stream stream, bool overlap) {
    PointwiseArgs a = {};
    a.a = from;
    a.output = to.view;
    a.channels = static_cast<int32_t>(to.shape.channels);
    a.height = static_cast<int32_t>(to.shape.height);
    a.width = static_cast<int32_t>(to.shape.width);
    a.shuffle = shuffle;
    launch_pointwise(a, precision_, batch_, stream, overlap);
  });
}

void Sequence::convolve(const Convolve& c) {
  const auto taps = static_cast<int32_t>(c.weight.sizes[2] * c.weight.sizes[3]);
  const auto out_channels = static_cast<int32_t>(c.output.shape.channels);
  PackArgs pack = {};
  pack.maps = static_cast<int32_t>(c.inputs.size());
  int32_t units = 0;
  for (size_t i = 0; i < c.inputs.size(); ++i) {
    pack.channels[i] = c.inputs[i].view.channels;
    units += static_cast<int32_t>(ceil_div(pack.channels[i], unit_channels(precision_)));
  }
  // More maps than one launch reads are copied into one, in units of their own.
  const bool gathers = c.inputs.size() > kMostInputs;
  const Shape& in = c.inputs[0].shape;
  Map all;
  if (gathers) {
    all = map({units * unit_channels(precision_), in.height, in.width});
    pack.packing = plan_packing(precision_, taps, &all.view.channels, 1, out_channels, c.stride);
    int64_t unit = 0;
    for (const Map& m : c.inputs) {
      Map part = all;
      part.view.data += unit * kUnitBytes;
      part.shape.channels = m.view.channels;
      copy(m.view, part);
      unit += ceil_div(m.view.channels, unit_channels(precision_));
    }
  } else {
    pack.packing = plan_packing(precision_, taps, pack.channels, pack.maps, out_channels, c.stride);
  }
  pack.weight = c.weight;
  pack.inner = c.inner;
  pack.bias = c.bias;
  pack.composition = c.composition;
  pack.out = packed_ + packed_bytes_;
  packed_bytes_ += round_up(pack.packing.bytes(), kAlignment);
  if (phase_ == Phase::kPack) launch_pack(pack, stream_);

  launch([&](device::Stream stream, bool overlap) {
    Convolution convolution;
    convolution.packing = pack.packing;
    ConvolutionArgs& a = convolution.args;
    if (gathers) {
      a.inputs[0] = all.view;
    } else {
      for (size_t i = 0; i < c.inputs.size(); ++i) a.inputs[i] = c.inputs[i].view;
    }
    a.output = c.output.view;
    a.residual = c.residual;
    a.given = c.given;
    a.second = c.second;
    a.weights = pack.out;
    a.bias = reinterpret_cast<const float*>(pack.out + pack.packing.weight_bytes());
    a.stride = c.stride;
    a.padding = c.padding;
    a.reflect = c.reflect;
    a.height = static_cast<int32_t>(in.height);
    a.width = static_cast<int32_t>(in.width);
    a.out_height = static_cast<int32_t>(c.output.shape.height);
    a.out_width = static_cast<int32_t>(c.output.shape.width);
    a.shuffle = 1;
    a.activation = c.activation;
    a.slope = c.slope;
    a.residual_mode = c.mode;
    a.pass = c.pass;
    prepare_convolution(convolution, batch_);
    launch_convolution(convolution, stream, overlap);
  });
}

void Sequence::weight_gradient(const Convolve& c, const Map& g, const WeightView& to_weight,
                               const WeightView& to_bias) {
  if (to_weight.data == nullptr && to_bias.data == nullptr) return;
  WeightGradient w;
  w.precision = precision_;
  w.taps = static_cast<int32_t>(c.weight.sizes[2] * c.weight.sizes[3]);
  w.stride = c.stride;
  w.padding = c.padding;
  w.reflect = c.reflect;
  w.height = static_cast<int32_t>(c.inputs[0].shape.height);
  w.width = static_cast<int32_t>(c.inputs[0].shape.width);
  w.gradient = g.view;
  w.out_height = static_cast<int32_t>(g.shape.height);
  w.out_width = static_cast<int32_t>(g.shape.width);
  w.batch = batch_;
  int64_t channel = 0;
  for (size_t first = 0; first < c.inputs.size(); first += kMostInputs) {
    w.inputs.clear();
    int64_t channels = 0;
    for (size_t i = first; i < std::min(c.inputs.size(), first + kMostInputs); ++i) {
      w.inputs.push_back(c.inputs[i].view);
      channels += c.inputs[i].view.channels;
    }
    if (to_weight.data != nullptr) w.weight = input_channels(to_weight, channel, channels);
    channel += channels;
    w.bias = first == 0 ? to_bias : WeightView{};
    if (w.weight.data == nullptr && w.bias.data == nullptr) continue;
    unsigned char* const space = temporary(weight_gradient_bytes(w));
    launch([&](device::Stream stream, bool overlap) { launch_weight_gradient(w, space, stream, overlap); });
  }
}

}  // namespace esr::cuda
