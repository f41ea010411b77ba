#include "depthwise.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../common/layout.h"
#include "epilogue.h"
#include "parts.h"
#include "pixel.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 128;
// A block has a slab of channels; a thread eight of them, in so many rows that one read of the input serves.
constexpr int kSlab = 32, kSlabUnits = kSlab / 8;
constexpr int kRows = 4;

// Eight neighbouring weights of a slab.
ESR_DEVICE void read_eight(const float* from, float (&values)[8]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto bits = device::load_shared<U32x4>(from + 4 * h);
    values[4 * h] = device::bits_float(bits.x), values[4 * h + 1] = device::bits_float(bits.y);
    values[4 * h + 2] = device::bits_float(bits.z), values[4 * h + 3] = device::bits_float(bits.w);
  }
}

// Adds a row of the input to the rows of the result that it belongs to; `tap_rows[r]` is the row of taps that does so
// for row r, negative for none.
template <typename Value, int kHalves>
ESR_DEVICE void add_row(const DepthwiseArgs& a, int half, const float* filters, int64_t image, int y, int x0, int unit,
                        int c, const int (&tap_rows)[kRows], float (&sums)[kRows][8]) {
  const View& input = a.input[half];
#pragma unroll 1
  for (int tap = 0; tap < a.taps_across; ++tap) {
    const int x = x0 + (tap - a.taps_across / 2) * a.dilation;
    if (x < 0 || x >= a.width) continue;
    float values[8];
    read_channels<Value>(input, 1, image, y, x, c, a.channels, values);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (tap_rows[r] < 0) continue;
      float weights[8];
      read_eight(filters + (tap_rows[r] * a.taps_across + tap) * (kHalves * kSlab) + unit * 8, weights);
#pragma unroll
      for (int k = 0; k < 8; ++k) sums[r][k] = fmaf(values[k], weights[k], sums[r][k]);
    }
  }
}

// One item is eight channels at kRows rows of one column. Shared memory: the slab's filters, [tap][half][channel], and
// behind them its biases.
template <typename Value, bool kGated>
ESR_KERNEL(kThreads, 4)
depthwise_kernel(ESR_ARGUMENT(DepthwiseArgs) a) {
  constexpr int kHalves = kGated ? 2 : 1;
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int thread = device::thread_index();
  const int first = device::block_row() / a.slabs;  // half; 0 where both are computed together
  const int slab = device::block_row() % a.slabs * kSlab;
  const int units = (a.channels - slab + 7) / 8 < kSlabUnits ? (a.channels - slab + 7) / 8 : kSlabUnits;
  const int taps = a.taps_down * a.taps_across;
  auto* filters = reinterpret_cast<float*>(device::shared_memory());
  for (int i = thread; i < (taps + 1) * kHalves * kSlab; i += kThreads) {
    const int tap = i / (kHalves * kSlab), c = slab + i % kSlab;
    const int64_t channel = int64_t{first + i / kSlab % kHalves} * a.channels + c;
    float value = 0.0f;
    if (c < a.channels && tap < taps) {
      const int t = a.flip ? taps - 1 - tap : tap;
      value = read_weight(a.weight, channel, 0, t / a.taps_across, t % a.taps_across);
    } else if (c < a.channels && a.bias.data != nullptr) {
      value = read_weight(a.bias, channel, 0, 0);
    }
    device::store_shared(filters + i, value);
  }
  device::sync_block();
  const bool pixels_first = a.output[first].channel != static_cast<int64_t>(sizeof(Value));
  const int64_t columns = int64_t{a.width} * units, stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + thread; i < a.groups * columns; i += stride) {
    const int64_t group = i / columns, image = group / a.row_groups;
    const int rest = static_cast<int>(i - group * columns);
    const int x = pixels_first ? rest % a.width : rest / units;
    const int unit = pixels_first ? rest / a.width : rest % units;
    const int c = slab + unit * 8;
    const int y0 = static_cast<int>(group - image * a.row_groups) * kRows;
    float sums[kHalves][kRows][8];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float bias[8];
      read_eight(filters + (taps * kHalves + half) * kSlab + unit * 8, bias);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[half][r][k] = bias[k];
      }
    }
#pragma unroll 1
    for (int j = 0; j < kRows + (a.taps_down - 1) * a.dilation; ++j) {
      const int y = y0 - a.taps_down / 2 * a.dilation + j;
      if (y < 0 || y >= a.height) continue;
      int tap_rows[kRows];
      bool any = false;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int tap = j < r ? -1 : (j - r) / a.dilation;
        tap_rows[r] = tap < a.taps_down && tap * a.dilation == j - r ? tap : -1;
        any = any || tap_rows[r] >= 0;
      }
      if (!any) continue;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        add_row<Value, kHalves>(a, first + half, filters + half * kSlab, image, y, x, unit, c, tap_rows, sums[half]);
      }
    }
#pragma unroll 1  // activations are much code
    for (int r = 0; r < kRows; ++r) {
      const int y = y0 + r;
      if (y >= a.height) break;
      float (&h)[8] = sums[0][0];  // the next row moves up
      float given[8];
      if (a.given.data != nullptr) read_channels<Value>(a.given, 1, image, y, x, c, a.channels, given);
      if constexpr (kGated) {
        float (&gate)[8] = sums[1][0];
        if (a.given.data == nullptr) {
          activate(h, a.activation, a.slope);
#pragma unroll
          for (int k = 0; k < 8; ++k) h[k] *= gate[k];
        } else {
          float activated[8];
#pragma unroll
          for (int k = 0; k < 8; ++k) activated[k] = h[k], gate[k] *= given[k];
          activate(activated, a.activation, a.slope);
          differentiate(h, gate, a.activation, a.slope);
#pragma unroll
          for (int k = 0; k < 8; ++k) gate[k] = c + k < a.channels ? given[k] * activated[k] : 0.0f;
          write_channels<Value>(a.output[1], 1, image, y, x, c, a.channels, gate);
        }
      } else if (a.given.data == nullptr) {
        activate(h, a.activation, a.slope);
      } else {
        differentiate(h, given, a.activation, a.slope);
      }
      // What fills up a unit may have come from a neighbour's channels.
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] = c + k < a.channels ? h[k] : 0.0f;
      write_channels<Value>(a.output[first], 1, image, y, x, c, a.channels, h);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 1; i < kRows; ++i) {
#pragma unroll
          for (int k = 0; k < 8; ++k) sums[half][i - 1][k] = sums[half][i][k];
        }
      }
    }
  }
}

// A block has a part of the rows, a slab of channels and a row of taps; a thread eight channels at every 32nd pixel.
constexpr int kLanes = kThreads / kSlabUnits;

template <typename Value>
ESR_KERNEL(kThreads, 4)
depthwise_gradient_kernel(ESR_ARGUMENT(DepthwiseGradientArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int thread = device::thread_index();
  const int down = device::block_row() % a.taps_down;
  const int slab = device::block_row() / a.taps_down % a.slabs * kSlab;
  const int half = device::block_row() / a.taps_down / a.slabs;
  const View& input = a.input[half];
  const View& given = a.given[half];
  const bool pixels_first = input.channel != static_cast<int64_t>(sizeof(Value));
  const int unit = pixels_first ? thread / kLanes : thread % kSlabUnits;
  const int lane = pixels_first ? thread % kLanes : thread / kSlabUnits;
  const int c = slab + unit * 8;
  float sums[kMostDepthwiseTaps][8] = {}, bias[8] = {};
  const int64_t begin = device::block_index() * a.rows_at_once;
  const int64_t end = begin + a.rows_at_once < a.rows ? begin + a.rows_at_once : a.rows;
  for (int64_t row = c < a.channels ? begin : end; row < end; ++row) {
    const int64_t image = row / a.height;
    const int y = static_cast<int>(row - image * a.height), from = y + (down - a.taps_down / 2) * a.dilation;
    const bool inside = from >= 0 && from < a.height;
    if (!inside && down > 0) continue;  // the first row of taps has the bias
    for (int x = lane; x < a.width; x += kLanes) {
      float g[8];
      read_channels<Value>(given, 1, image, y, x, c, a.channels, g);
#pragma unroll
      for (int k = 0; k < 8; ++k) bias[k] += g[k];
      if (!inside) continue;
#pragma unroll
      for (int tap = 0; tap < kMostDepthwiseTaps; ++tap) {
        const int at = x + (tap - a.taps_across / 2) * a.dilation;
        if (tap >= a.taps_across || at < 0 || at >= a.width) continue;
        float values[8];
        read_channels<Value>(input, 1, image, from, at, c, a.channels, values);
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[tap][k] = fmaf(values[k], g[k], sums[tap][k]);
      }
    }
  }
  // One tap after the other, and the bias last: 32 threads' sums of a channel, in order.
  auto* lanes = reinterpret_cast<float*>(device::shared_memory());
  const int taps = a.taps_down * a.taps_across;
  float* const to = a.partial + ((device::block_index() * a.halves + half) * (taps + 1)) * a.pitch + slab;
#pragma unroll
  for (int tap = 0; tap <= kMostDepthwiseTaps; ++tap) {
    const bool is_bias = tap == kMostDepthwiseTaps;
    if (is_bias ? down > 0 : tap >= a.taps_across) continue;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      device::store_shared(lanes + lane * (kSlab + 1) + unit * 8 + k,
                           is_bias ? bias[k] : sums[tap % kMostDepthwiseTaps][k]);
    }
    device::sync_block();
    if (thread < kSlab && slab + thread < a.channels) {
      float sum = 0.0f;
      for (int i = 0; i < kLanes; ++i) sum += device::load_shared<float>(lanes + i * (kSlab + 1) + thread);
      device::store_global(to + (is_bias ? taps : down * a.taps_across + tap) * int64_t{a.pitch} + thread, sum);
    }
    device::sync_block();
  }
}

// Parts of the weight gradient's rows. It must not depend on the device: sums in another order are other results.
void divide(DepthwiseGradientArgs& a, int64_t batch) {
  constexpr int64_t kBlocks = 1024, kLeastParts = 32;
  a.slabs = static_cast<int32_t>(ceil_div(a.channels, kSlab));
  a.pitch = static_cast<int32_t>(round_up(a.channels, kSlab));
  a.rows = batch * a.height;
  const int64_t most = std::max(kBlocks / (int64_t{a.halves} * a.slabs * a.taps_down), kLeastParts);
  a.rows_at_once = ceil_div(a.rows, std::min(a.rows, most));
}

}  // namespace

void check_depthwise(const std::string& name, int64_t channels, bool gated, const WeightView& weight) {
  STD_TORCH_CHECK(!gated || channels % 2 == 0, name, ": x has ", channels,
                  " channels, must be an even number for a gate");
  for (int d = 2; d < 4; ++d) {
    const int32_t side = weight.sizes[d];
    STD_TORCH_CHECK(side % 2 == 1 && side <= kMostDepthwiseTaps, name, ": weight has a side of ", side,
                    ", must be odd and at most ", kMostDepthwiseTaps);
  }
}

void set_depthwise(DepthwiseArgs& a, int64_t channels, int64_t height, int64_t width, bool gated,
                   const WeightView& weight, int64_t dilation) {
  a.halves = gated ? 2 : 1;
  a.gated = gated;
  a.channels = static_cast<int32_t>(channels / a.halves);
  a.weight = weight;
  a.taps_down = weight.sizes[2];
  a.taps_across = weight.sizes[3];
  // Beyond the image there are zeros, however far.
  a.dilation = static_cast<int32_t>(std::min(dilation, std::max<int64_t>({height, width, 1})));
  a.height = static_cast<int32_t>(height);
  a.width = static_cast<int32_t>(width);
}

void set_halves(const DepthwiseArgs& a, const View& whole, Precision precision, View (&halves)[2]) {
  halves[0] = whole;
  if (a.halves == 1) return;
  for (int i = 0; i < 2; ++i) {
    halves[i] = whole;
    halves[i].blocked = whole.blocked && a.channels * value_bytes(precision) % kUnitBytes == 0;
    halves[i].data += i * a.channels * whole.channel;
    halves[i].channels = a.channels;
  }
}

void launch_depthwise(DepthwiseArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  const int halves = args.gated ? 2 : 1;  // that a block computes together
  args.slabs = static_cast<int32_t>(ceil_div(args.channels, kSlab));
  args.row_groups = static_cast<int32_t>(ceil_div(args.height, kRows));
  args.groups = batch * args.row_groups;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.rows = args.slabs * (args.gated ? 1 : args.halves);
  shape.instance = args.gated ? 1 : 0;
  shape.shared_bytes = (args.taps_down * args.taps_across + 1) * halves * kSlab * 4;
  constexpr int64_t kBlocksPerMultiprocessor = 16;
  const int64_t items = args.groups * args.width * std::min<int64_t>(ceil_div(args.channels, 8), kSlabUnits);
  const int64_t most = ceil_div(device::properties().multiprocessors * kBlocksPerMultiprocessor, shape.rows);
  shape.blocks = std::min(ceil_div(items, kThreads), most);
  with_value(precision, [&](auto value) {
    using Value = decltype(value);
    if (args.gated) {
      device::launch("depthwise", &depthwise_kernel<Value, true>, shape, stream, overlap, args);
    } else {
      device::launch("depthwise", &depthwise_kernel<Value, false>, shape, stream, overlap, args);
    }
  });
}

int64_t depthwise_gradient_bytes(const DepthwiseGradientArgs& args, int64_t batch) {
  DepthwiseGradientArgs a = args;
  divide(a, batch);
  const int64_t sets = int64_t{a.halves} * (a.taps_down * a.taps_across + 1);
  return ceil_div(a.rows, a.rows_at_once) * sets * a.pitch * 4;
}

void launch_depthwise_gradient(DepthwiseGradientArgs args, Precision precision, int64_t batch, unsigned char* workspace,
                               device::Stream stream, bool overlap) {
  divide(args, batch);
  args.partial = reinterpret_cast<float*>(workspace);
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = ceil_div(args.rows, args.rows_at_once);
  shape.rows = args.halves * args.slabs * args.taps_down;
  shape.shared_bytes = kLanes * (kSlab + 1) * 4;
  with_value(precision, [&](auto value) {
    device::launch("depthwise_gradient", &depthwise_gradient_kernel<decltype(value)>, shape, stream, overlap, args);
  });
  PartsArgs parts = {};
  parts.partial = args.partial;
  parts.parts = shape.blocks;
  parts.groups = args.halves;
  parts.channels = args.channels;
  parts.pitch = args.pitch;
  parts.taps = args.taps_down * args.taps_across;
  parts.taps_across = args.taps_across;
  parts.weight = args.weight;
  parts.bias = args.bias;
  launch_parts(parts, stream, true);
}

}  // namespace esr::cuda
