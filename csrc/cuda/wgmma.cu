#include "wgmma.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../common/layout.h"
#include "convolution_kernels.h"

namespace esr::cuda {
namespace {

constexpr int kWarps = 4;  // of a warpgroup
constexpr int kBarrierBytes = 8;

// Bytes from a unit of a tile's pixels to the next. Neighbouring threads copy a pixel's units, then the next pixel's,
// eight of 16 bytes at a time: they fall on different banks if 4 pixels have 2 units 64 bytes apart (modulo 128), or 2
// have 4 units 32 bytes apart, or one has 8, 16 bytes apart.
int plane_bytes(int units) {
  const int apart = units > 4 ? 1 : (units > 2 ? 2 : 4);
  int pixels = kWgmmaInputHeight * kWgmmaInputWidth;
  while (pixels % 8 != apart) ++pixels;
  return pixels * kUnitBytes;
}

struct Layout {
  int stage_bytes, stages_at, results_at, tail_at, barrier_at, bytes;
};

Layout layout_of(const WgmmaPacking& p, int groups, int stages, const Packing* tail) {
  Layout l;
  l.stage_bytes = p.planes() * plane_bytes(p.units);
  l.stages_at = p.block_bytes();
  l.results_at = l.stages_at + groups * stages * l.stage_bytes;
  l.tail_at = l.results_at + groups * kWarps * result_bytes(p.tiles, 2, tail != nullptr);
  l.barrier_at = l.tail_at + (tail == nullptr ? 0 : static_cast<int>(tail->weight_bytes()));
  l.bytes = l.barrier_at + kBarrierBytes;
  return l;
}

bool fits(const WgmmaPacking& p, int groups, int stages, const Packing* tail) {
  return layout_of(p, groups, stages, tail).bytes <= device::properties().shared_bytes;
}

}  // namespace

bool plan_wgmma(Precision precision, int32_t channels, int32_t out_channels, WgmmaPacking* packing) {
  constexpr int kCapability = 90;  // no other one has these instructions
  if (device::properties().capability != kCapability) return false;
  if (precision != Precision::kFloat16 && precision != Precision::kBFloat16) return false;
  WgmmaPacking& p = *packing;
  p.precision = precision;
  p.units = static_cast<int32_t>(ceil_div(channels, unit_channels(precision)));
  p.out_channels = out_channels;
  if (p.units > kMostWgmmaUnits) return false;
  const int64_t tiles = ceil_div(out_channels, 8);
  p.blocks = static_cast<int32_t>(ceil_div(tiles, kMostTiles));
  p.tiles = static_cast<int32_t>(ceil_div(tiles, p.blocks));
  return fits(p, 1, 1, nullptr);
}

bool fits_wgmma_tail(const WgmmaPacking& packing, const Packing& tail) { return fits(packing, 1, 1, &tail); }

void prepare_wgmma(Wgmma& wgmma, int64_t batch) {
  WgmmaArgs& a = wgmma.args;
  ConvolutionArgs& c = a.convolution;
  const WgmmaPacking& p = a.packing;
  const Packing* tail = c.tail_weights == nullptr ? nullptr : &wgmma.tail;
  const int multiprocessors = device::properties().multiprocessors;
  const int64_t tiles =
      set_3x3_tiles(c, batch, p.out_channels, {kWgmmaHeight, kWgmmaWidthLog2, kWgmmaInputHeight, kWgmmaInputWidth});

  // As many warpgroups as have a tile and room: they take turns with products, so that all others' epilogues and loads
  // are hidden. Then a second stage for each.
  const auto share = static_cast<int>(std::min<int64_t>(ceil_div(tiles * p.blocks, multiprocessors), kMostWgmmaGroups));
  a.groups = std::max(share, 1);
  while (a.groups > 1 && !fits(p, a.groups, 1, tail)) --a.groups;
  c.stages = fits(p, a.groups, 2, tail) ? 2 : 1;
  const Layout l = layout_of(p, a.groups, c.stages, tail);
  a.plane_bytes = plane_bytes(p.units);
  c.stage_bytes = l.stage_bytes;
  a.stages_at = l.stages_at;
  a.results_at = l.results_at;
  a.barrier_at = l.barrier_at;
  if (tail != nullptr) {
    c.tail_at = l.tail_at - l.results_at;  // seen from there
    c.tail_channels = tail->out_channels;
  }
  for (int32_t step = 0; step < p.steps(); ++step) {
    const auto at = [&](int32_t half) {
      const WgmmaPacking::Place place = p.place(half);
      const int32_t pixel = place.tap / 3 * kWgmmaInputWidth + place.tap % 3;
      return (place.unit * a.plane_bytes + pixel * kUnitBytes) / 16;
    };
    const int32_t first = at(2 * step), second = at(2 * step + 1);
    a.offsets[step] = static_cast<uint32_t>(first | (second - first) << 16);
  }

  device::LaunchShape& shape = wgmma.shape;
  shape.threads = a.groups * kWarps * 32;
  shape.shared_bytes = l.bytes;
  shape.rows = p.blocks;
  shape.instance = p.tiles;
  shape.blocks = std::min<int64_t>(ceil_div(tiles, a.groups), std::max(1, multiprocessors / p.blocks));
}

void launch_wgmma(const Wgmma& w, device::Stream stream, bool overlap) {
  const bool half = w.args.packing.precision == Precision::kFloat16;
  (half ? launch_wgmma_float16 : launch_wgmma_bfloat16)(w, stream, overlap);
}

}  // namespace esr::cuda
