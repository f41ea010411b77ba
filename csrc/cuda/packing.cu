#include "packing.h"

#include <utility>

#include "../common/layout.h"
#include "tf32.h"
#include "weight_access.h"
#include "wgmma.h"
#include "winograd.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 128;

ESR_DEVICE float weight_value(const PackArgs& a, int o, int i, int tap) {
  switch (a.composition) {
    case Composition::kDepthwise:
      return read_weight(a.weight, o, i, tap) * read_weight(a.inner, o, i, 0);
    case Composition::kProduct: {
      float sum = 0.0f;
      for (int m = 0; m < a.weight.sizes[1]; ++m) {
        sum = fmaf(read_weight(a.weight, o, m, tap), read_weight(a.inner, m, i, 0), sum);
      }
      return sum;
    }
    default:
      return read_weight(a.weight, o, i, tap);
  }
}

ESR_DEVICE float bias_value(const PackArgs& a, int o) {
  float sum = a.bias.data == nullptr ? 0.0f : read_weight(a.bias, o, 0, 0);
  if (a.composition == Composition::kProduct && a.inner_bias.data != nullptr) {
    for (int m = 0; m < a.weight.sizes[1]; ++m) {
      for (int tap = 0; tap < a.packing.taps; ++tap)
        sum = fmaf(read_weight(a.weight, o, m, tap), read_weight(a.inner_bias, m, 0, 0), sum);
    }
  }
  return sum;
}

// The bias of an output channel, behind the weights.
template <typename P>
ESR_DEVICE void write_bias(const PackArgs& a, const P& packing, int64_t channel) {
  if (channel >= packing.padded_channels()) return;
  device::store_global(a.out + packing.weight_bytes() + channel * 4,
                       channel < packing.out_channels ? bias_value(a, static_cast<int>(channel)) : 0.0f);
}

// A unit's first channel among those of all maps, and how many of them its map has.
struct Unit {
  int channel, count;
};

ESR_DEVICE Unit find_unit(const PackArgs& a, int unit, int per_unit) {
  int channel = 0;
  for (int k = 0; k < a.maps; ++k) {
    const int units = (a.channels[k] + per_unit - 1) / per_unit;
    if (unit < units) return {channel + unit * per_unit, a.channels[k] - unit * per_unit};
    unit -= units;
    channel += a.channels[k];
  }
  return {0, 0};
}

// One thread for a lane's part of one step and one tile of channels; the last ones write the bias.
ESR_KERNEL(kThreads, 1) pack_kernel(ESR_ARGUMENT(PackArgs) a) {
  const Packing& p = a.packing;
  const int64_t index = device::block_index() * kThreads + device::thread_index();
  const int64_t parts = p.weight_bytes() / p.lane_bytes();
  if (index >= parts) return write_bias(a, p, index - parts);
  const int lane = static_cast<int>(index % 32), g = lane / 4, t = lane % 4;
  int64_t rest = index / 32;
  const int n = static_cast<int>(rest % p.channel_tiles);
  rest /= p.channel_tiles;
  const int total = p.total_steps();
  const bool pairs = p.precision == Precision::kFloat16 || p.precision == Precision::kBFloat16;
  const int per_unit = pairs ? 8 : 4;
  const Packing::Slab slab = p.slab_of(static_cast<int32_t>(rest % total));
  const int o = (static_cast<int>(rest / total) * p.channel_tiles + n) * 8 + g;

  uint32_t high[2], low[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int q = 2 * slab.step + half, tap = q / slab.units;
    const Unit unit = find_unit(a, slab.first_unit + q - tap * slab.units, per_unit);
    const auto value = [&](int c) {
      const bool exists = tap < p.taps && c < unit.count && o < p.out_channels;
      return exists ? weight_value(a, o, unit.channel + c, tap) : 0.0f;
    };
    if (pairs) {
      const float v0 = value(2 * t), v1 = value(2 * t + 1);
      high[half] = p.precision == Precision::kFloat16 ? device::pack_pair<device::float16>(v0, v1)
                                                      : device::pack_pair<device::bfloat16>(v0, v1);
    } else {
      const float v = value(t);
      high[half] = device::round_tf32(v);
      low[half] = left_over(v, high[half]);
    }
  }
  unsigned char* out = a.out + index * p.lane_bytes();
  if (p.precision == Precision::kTf32x3) {
    device::store_global(out, device::U32x4{high[0], high[1], low[0], low[1]});
  } else {
    device::store_global(out, device::U32x2{high[0], high[1]});
  }
}

// One weight at a position of a transformed square, G g Gt. The sign that `counts` (winograd_kernel.h) leaves out.
ESR_DEVICE float transformed_weight(const PackArgs& a, int o, int i, int position) {
  const auto row = [](int k, float x0, float x1, float x2) {
    if (k == 0) return x0;
    if (k == 3) return -x2;
    return 0.5f * (k == 1 ? x0 + x1 + x2 : x0 - x1 + x2);
  };
  float columns[3] = {};
#pragma unroll 1  // reading a weight, of three types and as any product, is much code
  for (int c = 0; c < 3; ++c) {
    columns[0] = columns[1], columns[1] = columns[2];
    columns[2] =
        row(position / 4, weight_value(a, o, i, c), weight_value(a, o, i, 3 + c), weight_value(a, o, i, 6 + c));
  }
  return row(position % 4, columns[0], columns[1], columns[2]);
}

// One thread for a lane's part of one step, one position and one tile of channels; the last ones write the bias.
ESR_KERNEL(kThreads, 1) winograd_pack_kernel(ESR_ARGUMENT(WinogradPackArgs) a) {
  const WinogradPacking& p = a.packing;
  const int64_t index = device::block_index() * kThreads + device::thread_index();
  const int64_t parts = p.weight_bytes() / 8;
  if (index >= parts) return write_bias(a.pack, p, index - parts);
  const int lane = static_cast<int>(index % 32), g = lane / 4, t = lane % 4, tiles = p.groups * p.tiles;
  int64_t rest = index / 32;
  const int n = static_cast<int>(rest % tiles);
  rest /= tiles;
  const int position = static_cast<int>(rest % kWinogradPositions);
  rest /= kWinogradPositions;
  const int step = static_cast<int>(rest % p.steps()), o = (static_cast<int>(rest / p.steps()) * tiles + n) * 8 + g;
  uint32_t pairs[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto value = [&](int c) {
      const int i = (2 * step + half) * 8 + 2 * t + c;
      return i < a.pack.channels[0] && o < p.out_channels ? transformed_weight(a.pack, o, i, position) : 0.0f;
    };
    pairs[half] = device::pack_pair<device::float16>(value(0), value(1));
  }
  device::store_global(a.pack.out + index * 8, device::U32x2{pairs[0], pairs[1]});
}

// One thread for a unit of a step and an output channel; the last ones write the bias.
ESR_KERNEL(kThreads, 1) wgmma_pack_kernel(ESR_ARGUMENT(WgmmaPackArgs) a) {
  const WgmmaPacking& p = a.packing;
  const int64_t index = device::block_index() * kThreads + device::thread_index();
  const int64_t parts = p.weight_bytes() / kUnitBytes;
  if (index >= parts) return write_bias(a.pack, p, index - parts);
  const int columns = p.tiles * 8, column = static_cast<int>(index % columns);
  const auto rest = static_cast<int>(index / columns), halves = 2 * p.steps();
  const WgmmaPacking::Place place = p.place(rest % halves);
  const int o = rest / halves * columns + column;
  uint32_t pairs[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto value = [&](int c) {
      const int i = place.unit * 8 + c;
      return i < a.pack.channels[0] && o < p.out_channels ? weight_value(a.pack, o, i, place.tap) : 0.0f;
    };
    const float v0 = value(2 * k), v1 = value(2 * k + 1);
    pairs[k] = p.precision == Precision::kFloat16 ? device::pack_pair<device::float16>(v0, v1)
                                                  : device::pack_pair<device::bfloat16>(v0, v1);
  }
  device::store_global(a.pack.out + index * kUnitBytes, device::U32x4{pairs[0], pairs[1], pairs[2], pairs[3]});
}

ESR_KERNEL(kMostConstants, 1) constants_kernel(ESR_ARGUMENT(ConstantsArgs) a) {
  const int i = device::thread_index();
  if (i < a.count) device::store_global(a.out + i, a.values[i]);
}

// A depthwise weight is the same for all channels of its dimension of size 1.
void share_single_channel(WeightView& weight) {
  for (int d = 0; d < 2; ++d) {
    if (weight.sizes[d] == 1) weight.strides[d] = 0;
  }
}

}  // namespace

WeightView adjoint(WeightView w) {
  std::swap(w.sizes[0], w.sizes[1]);
  std::swap(w.strides[0], w.strides[1]);
  for (int d = 2; d < 4; ++d) {
    w.data += (w.sizes[d] - 1) * w.strides[d] * dtype_bytes(w.dtype);
    w.strides[d] = -w.strides[d];
  }
  return w;
}

WeightView input_channels(WeightView w, int64_t first, int64_t count) {
  w.data += first * w.strides[1] * dtype_bytes(w.dtype);
  w.sizes[1] = static_cast<int32_t>(count);
  return w;
}

void launch_pack(const PackArgs& args, device::Stream stream) {
  const Packing& p = args.packing;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = ceil_div(p.weight_bytes() / p.lane_bytes() + p.padded_channels(), kThreads);
  PackArgs a = args;
  share_single_channel(a.weight);
  device::launch("pack", &pack_kernel, shape, stream, false, a);
}

void launch_wgmma_pack(const WgmmaPackArgs& args, device::Stream stream) {
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = ceil_div(args.packing.weight_bytes() / kUnitBytes + args.packing.padded_channels(), kThreads);
  WgmmaPackArgs a = args;
  share_single_channel(a.pack.weight);
  device::launch("wgmma_pack", &wgmma_pack_kernel, shape, stream, false, a);
}

void launch_winograd_pack(const WinogradPackArgs& args, device::Stream stream) {
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = ceil_div(args.packing.weight_bytes() / 8 + args.packing.padded_channels(), kThreads);
  device::launch("winograd_pack", &winograd_pack_kernel, shape, stream, false, args);
}

void launch_constants(const ConstantsArgs& args, device::Stream stream) {
  device::LaunchShape shape;
  shape.threads = kMostConstants;
  device::launch("constants", &constants_kernel, shape, stream, false, args);
}

}  // namespace esr::cuda
