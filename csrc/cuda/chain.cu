#include "chain.h"

#include <algorithm>

#include "../common/layout.h"

namespace esr::cuda {
namespace {

struct ClearArgs {
  uint32_t* flags;
  int32_t count;
};

constexpr int kClearThreads = 256;

ESR_KERNEL(kClearThreads, 1) clear_flags_kernel(ESR_ARGUMENT(ClearArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  for (int i = device::thread_index(); i < a.count; i += device::thread_count()) {
    device::store_global<uint32_t>(a.flags + i * (kFlagBytes / 4), 0);
  }
}

struct ChainTile {
  int height, width_log2, warps;

  int width() const { return 1 << width_log2; }
  int pixels() const { return height * width(); }
  int pixels_with_margin() const { return (height + 2) * (width() + 2); }
};
// A warp has four products of 16 pixels.
constexpr ChainTile kTiles[] = {{24, 5, 12}, {16, 5, 8}, {16, 4, 4}, {8, 4, 2}};

int most_warps(int channel_tiles) { return channel_tiles <= 4 ? 12 : 8; }  // chain_kernel.h's launch bounds

// Where every layer's input, result and residual lie in shared memory, with so many maps there; what has no room is
// read from device memory.
void place_maps(Chain& chain, const ChainPlan& plan, int maps, int map_bytes) {
  constexpr int kMostMaps = 3;
  int held[kMostMaps] = {0, -1, -1};  // the value in each
  int last_use[kMostChainLayers + 1];
  std::fill_n(last_use, plan.count + 1, -1);
  std::fill_n(chain.stored, plan.count + 1, false);
  for (int l = 0; l < plan.count; ++l) {
    if (plan.entries[l].residual >= 0) last_use[plan.entries[l].residual] = l;
  }
  int from = 0;
  for (int l = 0; l < plan.count; ++l) {
    ChainLayer& layer = chain.args.layers[l];
    const int residual = plan.entries[l].residual;
    const int kept = static_cast<int>(std::find(held, held + maps, residual) - held);
    layer.residual_at = residual >= 0 && kept < maps ? kept * map_bytes : -1;
    if (residual >= 0 && kept == maps) chain.stored[residual] = true;
    // A residual may be overwritten by the result: a thread reads its values before it writes them.
    int to = -1;
    for (int m = 0; m < maps; ++m) {
      if (m == from) continue;
      const bool free = held[m] < 0 || last_use[held[m]] <= l;
      if (to < 0 || free) to = m;
      if (free) break;
    }
    layer.from_at = from * map_bytes;
    layer.to_at = to * map_bytes;
    held[to] = l + 1;
    from = to;
  }
}

// Shared memory of a tile with so many maps; the layers' places in it.
int lay_out(Chain& chain, const ChainPlan& plan, const ChainTile& tile, int maps) {
  ChainArgs& a = chain.args;
  const Packing& first = plan.entries[0].packing;
  a.units = first.channel_tiles;
  a.slab_units = first.slab_units;
  int large_steps = 0;
  a.weights_bytes = 0;
  for (int l = 0; l < plan.count; ++l) {
    const Packing& p = plan.entries[l].packing;
    if (p.taps == 9) {
      a.slab_units = p.slab_units;
      large_steps = p.total_steps();
    }
    a.weights_bytes = std::max(a.weights_bytes, static_cast<int32_t>(p.bytes()));
  }
  if (large_steps == 0) large_steps = Packing{.slab_units = a.slab_units, .units = {a.units}}.total_steps();
  // An odd number of units: eight pixels that ldmatrix reads at once fall on different banks.
  a.pitch = (a.units | 1) * kUnitBytes;
  const int map_bytes = tile.pixels_with_margin() * a.pitch;
  place_maps(chain, plan, maps, map_bytes);
  a.weights_at = maps * map_bytes;
  a.tables_at = a.weights_at + 2 * a.weights_bytes;
  a.zeros_at =
      static_cast<int32_t>(round_up(a.tables_at + 8 * (large_steps + Packing::steps(1, a.units)), int64_t{kUnitBytes}));
  a.places_at = a.zeros_at + kUnitBytes;
  return a.places_at + 4 * tile.pixels();
}

int64_t resident(const Chain& chain) {
  return (chain.precision == Precision::kFloat16 ? resident_chain_float16 : resident_chain_bfloat16)(chain.shape);
}

}  // namespace

bool chainable(const Packing& p) {
  return (p.precision == Precision::kFloat16 || p.precision == Precision::kBFloat16) && p.inputs == 1 &&
         p.blocks == 1 && p.channel_tiles >= kFewestChainTiles && p.channel_tiles <= kMostChainTiles &&
         p.units[0] == p.channel_tiles && (p.taps == 9 || p.slab_units == p.units[0]);
}

bool chain_together(const Packing& first, const Packing& second) {
  return first.channel_tiles == second.channel_tiles &&
         (first.taps != second.taps || first.slab_units == second.slab_units);
}

bool prepare_chain(Chain& chain, const ChainPlan& plan, int64_t height, int64_t width, int64_t batch) {
  const device::Properties& gpu = device::properties();
  const int channel_tiles = plan.entries[0].packing.channel_tiles;
  chain.precision = plan.entries[0].packing.precision;
  chain.shape.instance = channel_tiles;
  const bool keeps =
      std::any_of(plan.entries, plan.entries + plan.count, [](const ChainPlan::Entry& e) { return e.residual >= 0; });
  const auto count = [&](const ChainTile& t) {
    return ceil_div(height, t.height) * ceil_div(width, t.width()) * batch;
  };
  // The work of the busiest multiprocessor; larger tiles have less border.
  const ChainTile* best = nullptr;
  int64_t least = 0;
  int best_maps = 0;
  for (const ChainTile& tile : kTiles) {
    const int64_t tiles = count(tile);
    if (tile.warps > most_warps(channel_tiles) || tiles > INT32_MAX) continue;
    for (int maps = keeps ? 3 : 2; maps >= 2; --maps) {
      chain.shape.threads = tile.warps * 32;
      chain.shape.shared_bytes = lay_out(chain, plan, tile, maps);
      if (chain.shape.shared_bytes > gpu.shared_bytes || resident(chain) < tiles) continue;
      const int64_t work = ceil_div(tiles, gpu.multiprocessors) * tile.pixels();
      if (best == nullptr || work < least) best = &tile, least = work, best_maps = maps;
      break;
    }
  }
  if (best == nullptr) return false;
  ChainArgs& a = chain.args;
  chain.shape.threads = best->warps * 32;
  chain.shape.shared_bytes = lay_out(chain, plan, *best, best_maps);
  chain.shape.blocks = count(*best);
  a.layer_count = plan.count;
  int exchange = 0;
  for (int l = 0; l < plan.count; ++l) {
    const bool needed = l + 1 < plan.count && plan.entries[l + 1].packing.taps == 9;
    a.layers[l].exchange = needed ? ++exchange : 0;
    a.layers[l].taps = plan.entries[l].packing.taps;
    a.layers[l].out_channels = plan.entries[l].packing.out_channels;
  }
  a.height = static_cast<int32_t>(height);
  a.width = static_cast<int32_t>(width);
  a.tile_height = best->height;
  a.tile_width_log2 = best->width_log2;
  a.tiles_across = static_cast<int32_t>(ceil_div(width, best->width()));
  a.tiles_down = static_cast<int32_t>(ceil_div(height, best->height));
  a.in_tile_height = best->height + 2;
  a.in_tile_width = best->width() + 2;
  a.stride = 1;
  a.padding = 1;
  return true;
}

void launch_chain(const Chain& chain, device::Stream stream, bool overlap) {
  const ClearArgs clear{chain.args.flags, static_cast<int32_t>(chain.shape.blocks)};
  device::LaunchShape shape;
  shape.threads = kClearThreads;
  device::launch("clear_flags", clear_flags_kernel, shape, stream, overlap, clear);
  (chain.precision == Precision::kFloat16 ? launch_chain_float16 : launch_chain_bfloat16)(chain, stream);
}

}  // namespace esr::cuda
