#include "modulate.h"

#include <algorithm>

#include "../common/layout.h"
#include "epilogue.h"
#include "pixel.h"
#include "teams_kernel.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 128;

// ---- where a position of a side comes from on a side of `from`; `scale` is their ratio
// -------------------------------

ESR_DEVICE int nearest(int i, float scale, int from) {
  const int at = static_cast<int>(static_cast<float>(i) * scale);
  return at < from ? at : from - 1;
}

// Between two positions, the second one with this weight.
struct Between {
  int low, high;
  float weight;
};

ESR_DEVICE Between between(int i, float scale, int from) {
  const float exact = fmaf(static_cast<float>(i) + 0.5f, scale, -0.5f), at = exact > 0.0f ? exact : 0.0f;
  const int floor = static_cast<int>(at), low = floor < from ? floor : from - 1;
  const float weight = at - static_cast<float>(low);
  return {low, low + 1 < from ? low + 1 : low, weight < 1.0f ? weight : 1.0f};
}

ESR_DEVICE int low_source(int i, float scale, int from, bool bilinear) {
  return bilinear ? between(i, scale, from).low : nearest(i, scale, from);
}

// The first of `size` positions that comes from `low` or from behind it, `size` where there is none.
ESR_DEVICE int first_from(int low, float scale, int from, int size, bool bilinear) {
  if (low <= 0) return 0;
  if (low >= from) return size;
  // Without roundings it would be this one, or the next.
  const int64_t twice = (2 * int64_t{low} + (bilinear ? 1 : 0)) * size / from - (bilinear ? 1 : 0);
  int i = static_cast<int>(twice > 0 ? twice / 2 : 0);
  while (i > 0 && low_source(i - 1, scale, from, bilinear) >= low) --i;
  while (i < size && low_source(i, scale, from, bilinear) < low) ++i;
  return i;
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------

// Eight channels of a pixel.
struct Item {
  int64_t image;
  int y, x, c;
};

ESR_DEVICE Item find_item(const ModulateArgs& a, int64_t i, bool pixels_first) {
  const int64_t columns = int64_t{a.width} * a.units, row = i / columns, image = row / a.height;
  const int rest = static_cast<int>(i - row * columns);
  const int x = pixels_first ? rest % a.width : rest / a.units;
  const int unit = pixels_first ? rest / a.width : rest % a.units;
  return {image, static_cast<int>(row - image * a.height), x, unit * 8};
}

// What a map has for an item where no two of its pixels are mixed.
template <typename Value>
ESR_DEVICE void read_nearest(const ModulateArgs& a, const ModulateMap& map, const Item& item, float (&values)[8]) {
  const int y = map.resized ? nearest(item.y, map.per_row, map.height) : item.y;
  const int x = map.resized ? nearest(item.x, map.per_column, map.width) : item.x;
  read_channels<Value>(map.view, 1, item.image, y, x, item.c, a.channels, values);
}

template <typename Value>
ESR_DEVICE void read_between(const ModulateArgs& a, const ModulateMap& map, const Item& item, float (&values)[8]) {
  const Between y = between(item.y, map.per_row, map.height), x = between(item.x, map.per_column, map.width);
  float corners[2][2][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int below = i >> 1, right = i & 1;
    read_channels<Value>(map.view, 1, item.image, below ? y.high : y.low, right ? x.high : x.low, item.c, a.channels,
                         corners[below][right]);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    float rows[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) rows[j] = fmaf(x.weight, corners[j][1][k], (1.0f - x.weight) * corners[j][0][k]);
    values[k] = fmaf(y.weight, rows[1], (1.0f - y.weight) * rows[0]);
  }
}

// The sum of all maps.
template <typename Value>
ESR_DEVICE void sum_maps(const ModulateArgs& a, const Item& item, float (&sum)[8]) {
  if (a.bilinear) {
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = 0.0f;
#pragma unroll 1
    for (int m = 0; m < a.count; ++m) {
      float values[8];
      if (a.maps[m].resized) {
        read_between<Value>(a, a.maps[m], item, values);
      } else {
        read_nearest<Value>(a, a.maps[m], item, values);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += values[k];
    }
    return;
  }
  // Each map is read while the one before it is under way.
  float next[8];
  read_nearest<Value>(a, a.maps[0], item, sum);
  if (a.count > 1) read_nearest<Value>(a, a.maps[1], item, next);
#pragma unroll 1
  for (int m = 1; m < a.count; ++m) {
    float values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = next[k];
    if (m + 1 < a.count) read_nearest<Value>(a, a.maps[m + 1], item, next);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] += values[k];
  }
}

template <typename Value>
ESR_KERNEL(kThreads, 6)
modulate_kernel(ESR_ARGUMENT(ModulateArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const bool pixels_first = a.output.channel != static_cast<int64_t>(sizeof(Value));
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(a, i, pixels_first);
    float x[8], gate[8];
    read_channels<Value>(a.input, 1, item.image, item.y, item.x, item.c, a.channels, x);
    sum_maps<Value>(a, item, gate);
    activate(gate, a.activation, a.slope);
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] *= gate[k];
    write_channels<Value>(a.output, 1, item.image, item.y, item.x, item.c, a.channels, x);
  }
}

// ---- gradients
// -------------------------------------------------------------------------------------------------------

template <typename Value>
ESR_KERNEL(kThreads, 5)
modulate_gradient_kernel(ESR_ARGUMENT(ModulateGradientArgs) g) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const ModulateArgs& a = g.forward;
  const bool pixels_first = a.input.channel != static_cast<int64_t>(sizeof(Value));
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const Item item = find_item(a, i, pixels_first);
    float x[8], given[8], sum[8];
    read_channels<Value>(a.input, 1, item.image, item.y, item.x, item.c, a.channels, x);
    read_channels<Value>(g.given, 1, item.image, item.y, item.x, item.c, a.channels, given);
    sum_maps<Value>(a, item, sum);
    if (a.output.data != nullptr) {
      float gate[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) gate[k] = sum[k];
      activate(gate, a.activation, a.slope);
#pragma unroll
      for (int k = 0; k < 8; ++k) gate[k] *= given[k];
      write_channels<Value>(a.output, 1, item.image, item.y, item.x, item.c, a.channels, gate);
    }
    if (g.sums == 0) continue;
#pragma unroll
    for (int k = 0; k < 8; ++k) given[k] *= x[k];
    differentiate(sum, given, a.activation, a.slope);
    // What fills up a unit is zeros.
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = item.c + k < a.channels ? sum[k] : 0.0f;
#pragma unroll 1
    for (int m = 0; m < g.sums; ++m) {
      write_channels<Value>(g.to_sum[m], 1, item.image, item.y, item.x, item.c, a.channels, sum);
    }
  }
}

// How much of a position goes to position `to` of a map.
ESR_DEVICE float share_of(int i, int to, float scale, int from) {
  const Between b = between(i, scale, from);
  return (b.low == to ? 1.0f - b.weight : 0.0f) + (b.high == to ? b.weight : 0.0f);
}

// A team adds up what comes from a pixel of a map.
template <typename Value>
ESR_KERNEL(kTeamThreads, 2)
resize_gradient_kernel(ESR_ARGUMENT(ResizeGradientArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  constexpr int kAhead = 4;  // reads of a member that are under way at once
  unsigned char* const shared = device::shared_memory();
  int m = 0;
  while (device::block_index() >= a.blocks_end[m]) ++m;
  const int64_t begin = m == 0 ? 0 : a.blocks_end[m - 1], blocks = a.blocks_end[m] - begin;
  const ModulateMap& map = a.to[m];
  const Teams& teams = a.teams[m];
  const Membership at = find_team(teams, a.given.channel != static_cast<int64_t>(sizeof(Value)));
  const int c = (device::block_row() * teams.units + at.unit) * 8;
  const int reach = a.bilinear ? 1 : 0;  // positions of the map before it that share
  for (int64_t first = (device::block_index() - begin) * teams.windows; first < a.windows[m];
       first += blocks * teams.windows) {
    const bool exists = at.exists && c < a.channels && first + at.window < a.windows[m];
    const WindowPlace p = find_window(exists ? first + at.window : first, map.height, map.width);
    float sums[8] = {};
    if (exists) {
      const int top = first_from(p.row - reach, map.per_row, map.height, a.height, a.bilinear);
      const int bottom = first_from(p.row + 1, map.per_row, map.height, a.height, a.bilinear);
      const int left = first_from(p.column - reach, map.per_column, map.width, a.width, a.bilinear);
      const int right = first_from(p.column + 1, map.per_column, map.width, a.width, a.bilinear);
      const Window w = {top, left, bottom - top, right > left ? right - left : 0};
      if (w.width > 0) {
        Walk next = begin_walk(w, at.member, teams.members);
        while (next.y < w.height) {
          float values[kAhead][8] = {}, shares[kAhead] = {};
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            if (next.y < w.height) {
              const int y = top + next.y, x = left + next.x;
              read_channels<Value>(a.given, 1, p.image, y, x, c, a.channels, values[i]);
              shares[i] = a.bilinear ? share_of(y, p.row, map.per_row, map.height) *
                                           share_of(x, p.column, map.per_column, map.width)
                                     : 1.0f;
            }
            step(next, w);
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int k = 0; k < 8; ++k) sums[k] = fmaf(shares[i], values[i][k], sums[k]);
          }
        }
      }
    }
    fold_teams(
        teams, at, exists, [&](int i) { leave_eight(shared, i, sums); },
        [&](int i) {
          float other[8];
          take_eight(shared, i, other);
#pragma unroll
          for (int k = 0; k < 8; ++k) sums[k] += other[k];
        });
    if (exists && at.member == 0) {
      write_channels<Value>(map.view, 1, p.image, p.row, p.column, c, a.channels, sums);
    }
  }
}

void set_scale(ModulateMap& map, int32_t height, int32_t width) {
  map.resized = map.height != height || map.width != width;
  map.per_row = static_cast<float>(map.height) / static_cast<float>(height);
  map.per_column = static_cast<float>(map.width) / static_cast<float>(width);
}

device::LaunchShape divide(ModulateArgs& a, int64_t batch) {
  for (int m = 0; m < a.count; ++m) set_scale(a.maps[m], a.height, a.width);
  a.units = static_cast<int32_t>(ceil_div(a.channels, 8));
  a.items = batch * a.height * a.width * a.units;
  constexpr int64_t kBlocksPerMultiprocessor = 16;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = std::min(ceil_div(a.items, kThreads), device::properties().multiprocessors * kBlocksPerMultiprocessor);
  return shape;
}

}  // namespace

void launch_modulate(ModulateArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  const device::LaunchShape shape = divide(args, batch);
  with_value(precision, [&](auto value) {
    device::launch("modulate", &modulate_kernel<decltype(value)>, shape, stream, overlap, args);
  });
}

void launch_modulate_gradient(ModulateGradientArgs args, Precision precision, int64_t batch, device::Stream stream,
                              bool overlap) {
  const device::LaunchShape shape = divide(args.forward, batch);
  with_value(precision, [&](auto value) {
    device::launch("modulate_gradient", &modulate_gradient_kernel<decltype(value)>, shape, stream, overlap, args);
  });
}

void launch_resize_gradient(ResizeGradientArgs args, Precision precision, int64_t batch, device::Stream stream,
                            bool overlap) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  device::LaunchShape shape;
  shape.threads = kTeamThreads;
  shape.blocks = 0;
  for (int m = 0; m < args.count; ++m) {
    ModulateMap& map = args.to[m];
    set_scale(map, args.height, args.width);
    // Bilinear, positions share with two of the map.
    const int64_t reach = args.bilinear ? 2 : 1;
    args.teams[m] =
        make_teams(args.channels, reach * ceil_div(args.height, map.height) * reach * ceil_div(args.width, map.width));
    args.windows[m] = batch * map.height * map.width;
    shape.blocks += std::min(ceil_div(args.windows[m], args.teams[m].windows),
                             device::properties().multiprocessors * kBlocksPerMultiprocessor);
    args.blocks_end[m] = shape.blocks;
    shape.rows = args.teams[m].slabs;  // of every map
    shape.shared_bytes = std::max(shape.shared_bytes, team_bytes(args.teams[m], 8));
  }
  with_value(precision, [&](auto value) {
    device::launch("resize_gradient", &resize_gradient_kernel<decltype(value)>, shape, stream, overlap, args);
  });
}

}  // namespace esr::cuda
