#include "adaptive_max_pool.h"

#include <algorithm>

#include "../common/layout.h"
#include "pixel.h"
#include "teams_kernel.h"

namespace esr::cuda {
namespace {

// Positions [first, end) of a side of `size` that belong to the i-th of `count`. The other way round it tells which
// windows a position is in.
struct Span {
  int first, end;
};

ESR_DEVICE Span span_of(int i, int size, int count) {
  return {static_cast<int>(int64_t{i} * size / count), static_cast<int>(((int64_t{i} + 1) * size + count - 1) / count)};
}

// So many reads of a member are under way at once.
constexpr int kAhead = 4;

// Eight channels' maxima and, where they are asked for, their places: the first in a window, or that of its last NaN.
template <bool kPlaces>
struct Maxima {
  float values[8];
  uint32_t places[kPlaces ? 8 : 1];

  // Takes in another value of channel k; its place may be anywhere.
  ESR_DEVICE void take(int k, float value, uint32_t place) {
    const bool is_nan = value != value, was_nan = values[k] != values[k];
    bool larger = value > values[k] || (is_nan && !was_nan);
    if constexpr (kPlaces) {
      if (is_nan && was_nan) larger = place > places[k];
      if (value == values[k]) larger = place < places[k];
      places[k] = larger ? place : places[k];
    }
    values[k] = larger ? value : values[k];
  }
};

template <typename Value, bool kPlaces>
ESR_KERNEL(kTeamThreads, 2)
adaptive_max_pool_kernel(ESR_ARGUMENT(AdaptiveMaxPoolArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  constexpr float kNone = -__builtin_inff();
  unsigned char* const shared = device::shared_memory();
  unsigned char* const shared_places = shared + kTeamThreads * 8 * 4;
  const Membership at = find_team(a.teams, a.input.channel != static_cast<int64_t>(sizeof(Value)));
  const int c = (device::block_row() * a.teams.units + at.unit) * 8;
  const int64_t stride = device::grid_size() * a.teams.windows;
  for (int64_t first = device::block_index() * a.teams.windows; first < a.windows; first += stride) {
    const int64_t window = first + at.window;
    const bool exists = at.exists && c < a.channels && window < a.windows;
    const WindowPlace p = find_window(exists ? window : first, a.pooled_height, a.pooled_width);
    Maxima<kPlaces> most;
    if (exists) {
      const Span rows = span_of(p.row, a.height, a.pooled_height), columns = span_of(p.column, a.width, a.pooled_width);
      const Window w = {rows.first, columns.first, rows.end - rows.first, columns.end - columns.first};
      Walk next = begin_walk(w, at.member, a.teams.members);
      // A member of a team too large for this window has its first pixel; to look at one again changes nothing.
      Walk now = next.y < w.height ? next : begin_walk(w, 0, 1);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        most.values[k] = kNone;
        if constexpr (kPlaces) most.places[k] = static_cast<uint32_t>(now.y * w.width + now.x);
      }
      do {
        float values[kAhead][8];
        uint32_t places[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (next.y < w.height) now = next;
          read_channels<Value>(a.input, 1, p.image, w.top + now.y, w.left + now.x, c, a.channels, values[i]);
          places[i] = static_cast<uint32_t>(now.y * w.width + now.x);
          step(next, w);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int k = 0; k < 8; ++k) most.take(k, values[i][k], places[i]);
        }
      } while (next.y < w.height);
    }
    fold_teams(
        a.teams, at, exists,
        [&](int i) {
          leave_eight(shared, i, most.values);
          if constexpr (kPlaces) leave_eight(shared_places, i, most.places);
        },
        [&](int i) {
          Maxima<kPlaces> other;
          take_eight(shared, i, other.values);
          if constexpr (kPlaces) take_eight(shared_places, i, other.places);
#pragma unroll
          for (int k = 0; k < 8; ++k) most.take(k, other.values[k], kPlaces ? other.places[k] : 0);
        });
    if (!exists || at.member > 0) continue;
    if constexpr (kPlaces) {
      uint32_t* const to = a.places + window * a.pitch + c;
      device::store_global(to, U32x4{most.places[0], most.places[1], most.places[2], most.places[3]});
      device::store_global(to + 4, U32x4{most.places[4], most.places[5], most.places[6], most.places[7]});
    } else {
      write_channels<Value>(a.output, 1, p.image, p.row, p.column, c, a.channels, most.values);
    }
  }
}

// Every element collects from the windows that it is the maximum of. One item is eight channels of a pixel.
template <typename Value>
ESR_KERNEL(kTeamThreads, 3)
adaptive_max_pool_gradient_kernel(ESR_ARGUMENT(AdaptiveMaxPoolGradientArgs) g) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const AdaptiveMaxPoolArgs& a = g.forward;
  const bool pixels_first = a.output.channel != static_cast<int64_t>(sizeof(Value));
  const int64_t stride = device::grid_size() * kTeamThreads, columns = int64_t{a.width} * g.units;
  for (int64_t i = device::block_index() * kTeamThreads + device::thread_index(); i < g.items; i += stride) {
    const int64_t row = i / columns, image = row / a.height;
    const int rest = static_cast<int>(i - row * columns), y = static_cast<int>(row - image * a.height);
    const int x = pixels_first ? rest % a.width : rest / g.units;
    const int c = (pixels_first ? rest / a.width : rest % g.units) * 8;
    const Span down = span_of(y, a.pooled_height, a.height), across = span_of(x, a.pooled_width, a.width);
    float sums[8] = {};
    for (int m = down.first; m < down.end; ++m) {
      const Span rows = span_of(m, a.height, a.pooled_height);
      for (int n = across.first; n < across.end; ++n) {
        const Span pixels = span_of(n, a.width, a.pooled_width);
        const auto place = static_cast<uint32_t>((y - rows.first) * (pixels.end - pixels.first) + (x - pixels.first));
        const int64_t window = (image * a.pooled_height + m) * a.pooled_width + n;
        float given[8];
        read_channels<Value>(g.given, 1, image, m, n, c, a.channels, given);
        const uint32_t* const from = a.places + window * a.pitch + c;
        const auto low = device::load_global<U32x4>(from), high = device::load_global<U32x4>(from + 4);
        const uint32_t places[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[k] += places[k] == place ? given[k] : 0.0f;
      }
    }
    write_channels<Value>(a.output, 1, image, y, x, c, a.channels, sums);
  }
}

constexpr int64_t kBlocksPerMultiprocessor = 8;

template <bool kPlaces>
void launch_pool_windows(AdaptiveMaxPoolArgs a, Precision precision, int64_t batch, device::Stream stream,
                         bool overlap) {
  const int64_t pixels = ceil_div(a.height, a.pooled_height) * ceil_div(a.width, a.pooled_width);
  a.teams = make_teams(a.channels, pixels);
  a.windows = batch * a.pooled_height * a.pooled_width;
  device::LaunchShape shape;
  shape.threads = kTeamThreads;
  shape.rows = a.teams.slabs;
  shape.blocks =
      std::min(ceil_div(a.windows, a.teams.windows), device::properties().multiprocessors * kBlocksPerMultiprocessor);
  shape.instance = kPlaces ? 1 : 0;
  shape.shared_bytes = team_bytes(a.teams, kPlaces ? 16 : 8);
  with_value(precision, [&](auto value) {
    device::launch("adaptive_max_pool", &adaptive_max_pool_kernel<decltype(value), kPlaces>, shape, stream, overlap, a);
  });
}

int32_t places_pitch(int32_t channels) { return static_cast<int32_t>(round_up(channels, 8)); }

}  // namespace

void launch_adaptive_max_pool(AdaptiveMaxPoolArgs args, Precision precision, int64_t batch, device::Stream stream,
                              bool overlap) {
  launch_pool_windows<false>(args, precision, batch, stream, overlap);
}

int64_t adaptive_max_pool_gradient_bytes(const AdaptiveMaxPoolGradientArgs& args, int64_t batch) {
  const AdaptiveMaxPoolArgs& a = args.forward;
  return batch * a.pooled_height * a.pooled_width * places_pitch(a.channels) * 4;
}

void launch_adaptive_max_pool_gradient(AdaptiveMaxPoolGradientArgs args, Precision precision, int64_t batch,
                                       unsigned char* workspace, device::Stream stream, bool overlap) {
  AdaptiveMaxPoolArgs& a = args.forward;
  a.places = reinterpret_cast<uint32_t*>(workspace);
  a.pitch = places_pitch(a.channels);
  launch_pool_windows<true>(a, precision, batch, stream, overlap);
  args.units = a.pitch / 8;
  args.items = batch * a.height * a.width * args.units;
  device::LaunchShape shape;
  shape.threads = kTeamThreads;
  shape.blocks =
      std::min(ceil_div(args.items, kTeamThreads), device::properties().multiprocessors * kBlocksPerMultiprocessor);
  with_value(precision, [&](auto value) {
    device::launch("adaptive_max_pool_gradient", &adaptive_max_pool_gradient_kernel<decltype(value)>, shape, stream,
                   true, args);
  });
}

}  // namespace esr::cuda
