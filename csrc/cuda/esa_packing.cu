#include "esa.h"

#include "tf32.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 128;

ESR_DEVICE float read(const WeightView& w, int i0, int i1, int tap) {
  return w.data == nullptr ? 0.0f : read_weight(w, i0, i1, tap);
}

// One float of LowWeights.
ESR_DEVICE float low_value(const EsaPackArgs& a, int index) {
  const LowWeights& p = a.low;
  const int weights = p.weight_bytes() / 4;
  if (index >= weights) {
    const int o = index - weights;
    return o < p.hidden ? read(a.low_bias, o, 0, 0) : 0.0f;
  }
  const int s = index / 4 % 4;
  int rest = index / 16;
  const int o = rest % p.fours() * 4 + index % 4;
  rest /= p.fours();
  const int group = rest % p.groups();
  rest /= p.groups();
  const int i = group * 16 + s * 4 + rest % 4;
  return i < p.hidden && o < p.hidden ? read(a.low_weight, o, i, rest / 4) : 0.0f;
}

// A lane's part of one step and one tile of GateWeights.
ESR_DEVICE void pack_gate(const EsaPackArgs& a, int index) {
  const GateWeights& p = a.gate;
  const int lane = index % 32, g = lane / 4, t = lane % 4;
  const int step = index / 32 % p.steps(), o = index / 32 / p.steps() * 8 + g;
  const auto value = [&](int i) { return i < p.hidden && o < p.channels ? read(a.gate_weight, o, i, 0) : 0.0f; };
  uint32_t high[2], low[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (p.pairs()) {
      const int i = step * 16 + half * 8 + 2 * t;
      high[half] = p.precision == Precision::kFloat16 ? device::pack_pair<device::float16>(value(i), value(i + 1))
                                                      : device::pack_pair<device::bfloat16>(value(i), value(i + 1));
    } else {
      // In the order in which an accumulator's columns become a left operand's: 2 t for t, 2 t + 1 for t + 4.
      const float v = value(step * 8 + 2 * t + half);
      high[half] = device::round_tf32(v);
      low[half] = left_over(v, high[half]);
    }
  }
  unsigned char* out = a.gate_out + int64_t{index} * p.lane_bytes();
  if (p.precision == Precision::kTf32x3) {
    device::store_global(out, device::U32x4{high[0], high[1], low[0], low[1]});
  } else {
    device::store_global(out, device::U32x2{high[0], high[1]});
  }
}

ESR_KERNEL(kThreads, 1) esa_pack_kernel(ESR_ARGUMENT(EsaPackArgs) a) {
  int index = static_cast<int>(device::block_index()) * kThreads + device::thread_index();
  const int low = a.low.bytes() / 4;
  if (index < low) {
    device::store_global(a.low_out + index * 4, low_value(a, index));
    return;
  }
  index -= low;
  const int parts = a.gate.weight_bytes() / a.gate.lane_bytes();
  if (index < parts) {
    pack_gate(a, index);
    return;
  }
  index -= parts;
  if (index < a.gate.channel_tiles() * 8) {
    device::store_global(a.gate_out + a.gate.weight_bytes() + index * 4,
                         index < a.gate.channels ? read(a.gate_bias, index, 0, 0) : 0.0f);
  }
}

}  // namespace

void launch_esa_pack(const EsaPackArgs& args, device::Stream stream) {
  device::LaunchShape shape;
  shape.threads = kThreads;
  const int items =
      args.low.bytes() / 4 + args.gate.weight_bytes() / args.gate.lane_bytes() + args.gate.channel_tiles() * 8;
  shape.blocks = ceil_div(items, kThreads);
  device::launch("esa_pack", &esa_pack_kernel, shape, stream, false, args);
}

}  // namespace esr::cuda
