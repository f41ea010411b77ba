#include "adjoint.h"

#include <algorithm>
#include <cmath>

#include "../common/layout.h"
#include "pixel.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 256;

device::LaunchShape shape_for(int64_t items) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = std::min(ceil_div(items, kThreads), device::properties().multiprocessors * kBlocksPerMultiprocessor);
  return shape;
}

// Eight channels of a pixel.
struct Item {
  int64_t image;
  int y, x, c;
};

// The i-th of all images' items; neighbours lie side by side in a map whose channels do, or else whose pixels do.
ESR_DEVICE Item find_item(int64_t i, int height, int width, int units, bool pixels_first) {
  const int64_t row = i / (int64_t{units} * width);
  const int rest = static_cast<int>(i - row * (int64_t{units} * width));
  const int x = pixels_first ? rest % width : rest / units;
  const int unit = pixels_first ? rest / width : rest % units;
  const int64_t image = row / height;
  return {image, static_cast<int>(row - image * height), x, unit * 8};
}

template <typename Value>
ESR_KERNEL(kThreads, 2)
unpad_kernel(ESR_ARGUMENT(UnpadArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const bool pixels_first = a.output.channel != static_cast<int64_t>(sizeof(Value));
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(i, a.height, a.width, a.units, pixels_first);
    float sum[8] = {};
    // Row y of the map is row y + 1 of the padded one; row 1 is also its row 0, the last but one its last.
    for (int down = 0; down < 3; ++down) {
      if ((down == 1 && item.y != 1) || (down == 2 && item.y != a.height - 2)) continue;
      const int y = down == 0 ? item.y + 1 : (down == 1 ? 0 : a.height + 1);
      for (int across = 0; across < 3; ++across) {
        if ((across == 1 && item.x != 1) || (across == 2 && item.x != a.width - 2)) continue;
        const int x = across == 0 ? item.x + 1 : (across == 1 ? 0 : a.width + 1);
        float values[8];
        read_channels<Value>(a.padded, 1, item.image, y, x, item.c, a.channels, values);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[k] += values[k];
      }
    }
    write_channels<Value>(a.output, 1, item.image, item.y, item.x, item.c, a.channels, sum);
  }
}

// A position between two rows or columns of a map of `low`, where resizing finds the i-th of `size`: the first of them,
// and the other one's weight.
struct Between {
  int first;
  float weight;
};

ESR_DEVICE Between between(int i, int low, int size) {
  const int64_t numerator = (2 * int64_t{i} + 1) * low - size;
  if (numerator <= 0) return {0, 0.0f};
  const int first = static_cast<int>(numerator / (2 * size));
  return {first, static_cast<float>(numerator - int64_t{first} * (2 * size)) / static_cast<float>(2 * size)};
}

template <typename Value>
ESR_KERNEL(kThreads, 2)
resize_kernel(ESR_ARGUMENT(ResizeArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(i, a.height, a.width, a.units, false);
    const Between down = between(item.y, a.low_height, a.height), across = between(item.x, a.low_width, a.width);
    float sum[8];
    read_channels<Value>(a.skip, 1, item.image, item.y, item.x, item.c, a.channels, sum);
#pragma unroll 1
    for (int corner = 0; corner < 4; ++corner) {
      const int right = corner & 1, below = corner >> 1;
      const float weight = (right ? across.weight : 1.0f - across.weight) * (below ? down.weight : 1.0f - down.weight);
      const int y = down.first + below < a.low_height ? down.first + below : down.first;
      const int x = across.first + right < a.low_width ? across.first + right : across.first;
      float values[8];
      read_channels<Value>(a.low, 1, item.image, y, x, item.c, a.channels, values);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] = fmaf(weight, values[k], sum[k]);
    }
    write_channels<Value>(a.output, 1, item.image, item.y, item.x, item.c, a.channels, sum);
  }
}

struct ResizeAdjointArgs {
  View from, to;
  bool across;            // along the width, or else the height
  int32_t size, low;      // along that axis, of `from` and of `to`
  int32_t height, width;  // of `to`
  int32_t channels;
  int32_t units;
  int64_t items;
};

// Every element collects from those that read it, each with its weight.
template <typename From, typename To>
ESR_KERNEL(kThreads, 2)
resize_adjoint_kernel(ESR_ARGUMENT(ResizeAdjointArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(i, a.height, a.width, a.units, false);
    const int at = a.across ? item.x : item.y;
    // Positions from at - 1 to at + 1 of the low map, and one more on either side for rounding.
    const int64_t first = (2 * int64_t{at} - 1) * a.size / (2 * a.low) - 2;
    const int64_t last = (2 * int64_t{at} + 3) * a.size / (2 * a.low) + 1;
    const int end = static_cast<int>(last < a.size ? last + 1 : a.size);
    float sum[8] = {};
    for (int j = static_cast<int>(first > 0 ? first : 0); j < end; ++j) {
      const Between b = between(j, a.low, a.size);
      const int second = b.first + 1 < a.low ? b.first + 1 : b.first;
      const float weight = (b.first == at ? 1.0f - b.weight : 0.0f) + (second == at ? b.weight : 0.0f);
      if (weight == 0.0f) continue;
      float values[8];
      read_channels<From>(a.from, 1, item.image, a.across ? item.y : j, a.across ? j : item.x, item.c, a.channels,
                          values);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] = fmaf(weight, values[k], sum[k]);
    }
    write_channels<To>(a.to, 1, item.image, item.y, item.x, item.c, a.channels, sum);
  }
}

template <typename Value>
ESR_KERNEL(kThreads, 2)
pool_kernel(ESR_ARGUMENT(PoolArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(i, a.height, a.width, a.units, false);
    float most[8];
    uint32_t where[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) most[k] = -INFINITY, where[k] = 0;
#pragma unroll 1
    for (int j = 0; j < kPoolWindow * kPoolWindow; ++j) {
      const int y = item.y * kPoolStep + j / kPoolWindow, x = item.x * kPoolStep + j % kPoolWindow;
      float values[8];
      read_channels<Value>(a.in, 1, item.image, y, x, item.c, a.channels, values);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (values[k] > most[k] || values[k] != values[k]) most[k] = values[k], where[k] = static_cast<uint32_t>(j);
      }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (item.c + k >= a.channels) most[k] = 0.0f;
    }
    write_channels<Value>(a.out, 1, item.image, item.y, item.x, item.c, a.channels, most);
    device::store_global(a.index + i * 8, U32x2{where[0] | where[1] << 8 | where[2] << 16 | where[3] << 24,
                                                where[4] | where[5] << 8 | where[6] << 16 | where[7] << 24});
  }
}

// Every element collects from the windows whose maximum it was.
template <typename Value>
ESR_KERNEL(kThreads, 2)
pool_adjoint_kernel(ESR_ARGUMENT(PoolAdjointArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(i, a.height, a.width, a.units, false);
    float sum[8] = {};
    if (item.y % 2 == 0 && item.x % 2 == 0) {
      const int y = item.y / 2, x = item.x / 2;
      // Windows begin at multiples of 3; those of the last three rows and columns reach this element.
      constexpr int kReach = (kPoolWindow + kPoolStep - 1) / kPoolStep;
#pragma unroll 1
      for (int j = 0; j < kReach * kReach; ++j) {
        const int py = y / kPoolStep - j / kReach, px = x / kPoolStep - j % kReach;
        const int dy = y - py * kPoolStep, dx = x - px * kPoolStep;
        if (py < 0 || px < 0 || py >= a.pooled_height || px >= a.pooled_width) continue;
        if (dy >= kPoolWindow || dx >= kPoolWindow) continue;
        const int64_t pooled = (item.image * a.pooled_height + py) * a.pooled_width + px;
        const auto where = device::load_global<U32x2>(a.index + (pooled * a.units + item.c / 8) * 8);
        const auto here = static_cast<uint32_t>(dy * kPoolWindow + dx);
        float values[8];
        read_channels<Value>(a.from, 1, item.image, py, px, item.c, a.channels, values);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (((k < 4 ? where.x : where.y) >> (k % 4 * 8) & 0xff) == here) sum[k] += values[k];
        }
      }
    }
    write_channels<Value>(a.to, 1, item.image, item.y, item.x, item.c, a.channels, sum);
  }
}

// One block for an output channel, one warp for a tap.
ESR_KERNEL(9 * 32, 1) factors_kernel(ESR_ARGUMENT(FactorsArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int o = static_cast<int>(device::block_index());
  const int thread = device::thread_index(), lane = thread & 31, tap = thread >> 5;
  const float* product = a.product + int64_t{o} * a.channels * 9;
  if (a.to_depthwise.data != nullptr) {
    float sum = 0.0f;
    for (int c = lane; c < a.channels; c += 32) {
      sum = fmaf(device::load_global<float>(product + c * 9 + tap), read_weight(a.pointwise, o, c, 0), sum);
    }
    for (int mask = 16; mask > 0; mask >>= 1) sum += device::shuffle_xor(sum, mask);
    if (lane == 0) write_weight(a.to_depthwise, o, 0, tap, sum);
  }
  if (a.to_pointwise.data != nullptr) {
    for (int c = thread; c < a.channels; c += 9 * 32) {
      float sum = 0.0f;
      for (int t = 0; t < 9; ++t) {
        sum = fmaf(device::load_global<float>(product + c * 9 + t), read_weight(a.depthwise, o, 0, t), sum);
      }
      write_weight(a.to_pointwise, o, c, 0, sum);
    }
  }
}

// Fills in what follows from the sizes of the map that is written.
template <typename Args>
void count_items(Args& args, int64_t batch) {
  args.units = static_cast<int32_t>(ceil_div(args.channels, 8));
  args.items = batch * args.height * args.width * args.units;
}

template <typename From, typename To>
void launch_one_axis(ResizeAdjointArgs args, int64_t batch, device::Stream stream, bool overlap) {
  count_items(args, batch);
  device::launch("resize_adjoint", &resize_adjoint_kernel<From, To>, shape_for(args.items), stream, overlap, args);
}

}  // namespace

void launch_unpad(UnpadArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  count_items(args, batch);
  with_value(precision, [&](auto value) {
    device::launch("unpad", &unpad_kernel<decltype(value)>, shape_for(args.items), stream, overlap, args);
  });
}

void launch_resize(ResizeArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  count_items(args, batch);
  with_value(precision, [&](auto value) {
    device::launch("resize", &resize_kernel<decltype(value)>, shape_for(args.items), stream, overlap, args);
  });
}

void launch_resize_adjoint(const ResizeAdjoint& r, Precision precision, int64_t batch, device::Stream stream,
                           bool overlap) {
  ResizeAdjointArgs columns = {};
  columns.from = r.from;
  columns.to = r.between;
  columns.across = true;
  columns.size = r.width;
  columns.low = columns.width = r.low_width;
  columns.height = r.height;
  columns.channels = r.channels;
  ResizeAdjointArgs rows = columns;
  rows.from = r.between;
  rows.to = r.to;
  rows.across = false;
  rows.size = r.height;
  rows.low = rows.height = r.low_height;
  with_value(precision, [&](auto value) {
    launch_one_axis<decltype(value), float>(columns, batch, stream, overlap);
    launch_one_axis<float, decltype(value)>(rows, batch, stream, true);
  });
}

void launch_pool(PoolArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  count_items(args, batch);
  with_value(precision, [&](auto value) {
    device::launch("pool", &pool_kernel<decltype(value)>, shape_for(args.items), stream, overlap, args);
  });
}

void launch_pool_adjoint(PoolAdjointArgs args, Precision precision, int64_t batch, device::Stream stream,
                         bool overlap) {
  count_items(args, batch);
  with_value(precision, [&](auto value) {
    device::launch("pool_adjoint", &pool_adjoint_kernel<decltype(value)>, shape_for(args.items), stream, overlap, args);
  });
}

void launch_factors(const FactorsArgs& args, int64_t out_channels, device::Stream stream, bool overlap) {
  device::LaunchShape shape;
  shape.blocks = out_channels;
  shape.threads = 9 * 32;
  device::launch("factors", &factors_kernel, shape, stream, overlap, args);
}

}  // namespace esr::cuda
