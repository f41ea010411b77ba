#include "spab.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>

#include "../common/layout.h"
#include "convolution_kernels.h"

namespace esr::cuda {
namespace {

constexpr int kReserved = 1024;  // of every block's shared memory, by the runtime

struct SpabTile {
  int height, width_log2, warps;
  bool large;

  int width() const { return 1 << width_log2; }
  int pixels(int margin) const { return (height + 2 * margin) * (width() + 2 * margin); }
  // What a multiprocessor does for a tile: products of 16 pixels, three convolutions, idle warps counted.
  int work() const {
    int rows = 0;
    for (int k = 0; k < 3; ++k) rows += large ? spab_rows<true>(k) : spab_rows<false>(k);
    return warps * rows;
  }
};
constexpr std::array<SpabTile, 3> kTiles = {{{16, 5, 8, true}, {16, 4, 8, false}, {8, 4, 4, false}}};

struct Layout {
  int pitch, inner_at, weights_at, tables_at, zeros_at, bytes;
};

Layout layout_of(const Packing& p, const SpabTile& tile, bool weights_stay) {
  Layout l;
  // An odd number of units: eight pixels that ldmatrix reads at once fall on different banks.
  l.pitch = (p.units[0] | 1) * kUnitBytes;
  l.inner_at = tile.pixels(3) * l.pitch;
  // The results of the third convolution are turned around where those of the first were.
  const int results = tile.warps * result_bytes(p.channel_tiles, static_cast<int>(value_bytes(p.precision)), false);
  l.weights_at = l.inner_at + std::max(tile.pixels(2) * l.pitch, results);
  l.tables_at = l.weights_at + static_cast<int>(p.weight_bytes()) * (weights_stay ? 3 : 1);
  l.zeros_at = static_cast<int>(round_up(l.tables_at + 3 * p.total_steps() * 8, kUnitBytes));
  l.bytes = l.zeros_at + kUnitBytes;
  return l;
}

bool fits(const Packing& p, const SpabTile& tile) {
  if (tile.large && p.channel_tiles > kMostLargeTiles) return false;
  return layout_of(p, tile, false).bytes <= device::properties().shared_bytes;
}

// Blocks that a multiprocessor holds at a time.
int resident(const Packing& p, const SpabTile& tile, int shared_bytes) {
  // Of the launch bounds: two blocks of 256 threads, or one.
  const int blocks = (!tile.large && p.channel_tiles <= 4 ? 2 : 1) * (8 / tile.warps);
  return std::max(1, std::min(blocks, device::properties().shared_bytes_in_all / (shared_bytes + kReserved)));
}

}  // namespace

bool plan_spab(const Packing& first, const Packing& second, const Packing& third) {
  if (first.precision != Precision::kFloat16 && first.precision != Precision::kBFloat16) return false;
  if (first.channel_tiles < kFewestSpabTiles) return false;
  for (const Packing* p : {&first, &second, &third}) {
    if (p->taps != 9 || p->inputs != 1 || p->blocks != 1 || p->channel_tiles != first.channel_tiles ||
        p->units[0] != first.channel_tiles || p->slab_units != first.slab_units) {
      return false;
    }
  }
  return std::any_of(kTiles.begin(), kTiles.end(), [&](const SpabTile& tile) { return fits(first, tile); });
}

void prepare_spab(Spab& spab, int64_t batch) {
  ConvolutionArgs& c = spab.args.last;
  const Packing& p = spab.args.packing;
  const device::Properties& gpu = device::properties();
  const auto count = [&](const SpabTile& t) {
    return ceil_div(c.height, t.height) * ceil_div(c.width, t.width()) * batch;
  };
  const SpabTile* best = nullptr;
  int64_t least = 0;
  for (const SpabTile& tile : kTiles) {
    if (!fits(p, tile)) continue;
    const int64_t work = ceil_div(count(tile), gpu.multiprocessors) * tile.work();
    if (best == nullptr || work < least) best = &tile, least = work;
  }
  STD_TORCH_CHECK(best != nullptr, "spab: no tile fits, which plan_spab tells");
  STD_TORCH_CHECK(count(*best) < INT32_MAX, "spab: ", batch, " images of ", c.height, "x", c.width,
                  " are too large for one launch");
  // All weights at once where that does not cost a block.
  const int bytes = layout_of(p, *best, true).bytes;
  const bool stay =
      bytes <= gpu.shared_bytes && resident(p, *best, bytes) == resident(p, *best, layout_of(p, *best, false).bytes);
  const Layout l = layout_of(p, *best, stay);
  spab.large = best->large;
  spab.args.steps = p.total_steps();
  spab.args.weights_stay = stay;
  spab.args.inner_at = l.inner_at;
  spab.args.weights_at = l.weights_at;
  spab.args.tables_at = l.tables_at;
  spab.args.zeros_at = l.zeros_at;
  c.stride = 1;
  c.padding = 3;
  c.out_height = c.height;
  c.out_width = c.width;
  const int64_t tiles = set_tiles(c, batch, {best->height, best->width_log2, best->height + 6, best->width() + 6});
  c.pitch = l.pitch;
  c.shuffle = 1;
  c.residual = c.inputs[0];
  c.residual_mode = ResidualMode::kAttention;
  spab.shape.threads = best->warps * 32;
  spab.shape.shared_bytes = l.bytes;
  spab.shape.instance = p.channel_tiles;
  spab.shape.blocks = std::min<int64_t>(tiles, int64_t{gpu.multiprocessors} * resident(p, *best, l.bytes));
}

void launch_spab(const Spab& spab, device::Stream stream, bool overlap) {
  (spab.args.packing.precision == Precision::kFloat16 ? launch_spab_float16 : launch_spab_bfloat16)(spab, stream,
                                                                                                    overlap);
}

}  // namespace esr::cuda
