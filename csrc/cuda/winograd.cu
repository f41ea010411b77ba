#include "winograd.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../common/layout.h"
#include "convolution_kernels.h"

namespace esr::cuda {
namespace {

constexpr int kHeight = 2 * kWinogradRows, kWidthLog2 = 5;
constexpr int kInputHeight = kHeight + 2, kInputWidth = (1 << kWidthLog2) + 2;
static_assert(2 * kSquaresAcross == 1 << kWidthLog2);
constexpr int kReserved = 1024;  // of every block's shared memory, by the runtime

struct Layout {
  int pitch, stage_bytes, weights_at, results_at, zeros_at, bytes;
};

Layout layout_of(const WinogradPacking& p, int stages) {
  Layout l;
  // An odd number of units: eight pixels that ldmatrix reads at once fall on different banks.
  l.pitch = (p.units | 1) * kUnitBytes;
  l.stage_bytes = kInputHeight * kInputWidth * l.pitch;
  l.weights_at = stages * l.stage_bytes;
  l.results_at = l.weights_at + p.block_bytes();
  l.zeros_at = l.results_at + kWinogradRows * p.groups * result_bytes(p.tiles, 2, false);
  l.bytes = l.zeros_at + kUnitBytes;
  return l;
}

}  // namespace

bool plan_winograd(Precision precision, int32_t channels, int32_t out_channels, WinogradPacking* packing) {
  if (precision != Precision::kFloat16 && precision != Precision::kBFloat16) return false;
  WinogradPacking p;
  p.units = static_cast<int32_t>(ceil_div(channels, unit_channels(precision)));
  p.out_channels = out_channels;
  // One unit would leave half of every product empty; a tile loads all units at once.
  constexpr int32_t kMostUnits = 8, kMostBlocks = 8;
  if (p.units < 2 || p.units > kMostUnits) return false;
  const auto tiles = static_cast<int32_t>(ceil_div(out_channels, 8));
  // As few blocks as possible, for each transforms its input again; then few padded channels, then two groups.
  for (p.blocks = 1; p.blocks <= kMostBlocks; ++p.blocks) {
    bool found = false;
    for (p.groups = 2; p.groups > 0; --p.groups) {
      p.tiles = static_cast<int32_t>(ceil_div(tiles, p.blocks * p.groups));
      if (p.tiles > kMostWinogradTiles || layout_of(p, 1).bytes > device::properties().shared_bytes) continue;
      if (!found || p.padded_channels() < packing->padded_channels()) *packing = p;
      found = true;
    }
    if (found) return true;
  }
  return false;
}

void prepare_winograd(Winograd& winograd, int64_t batch) {
  ConvolutionArgs& c = winograd.args.convolution;
  const WinogradPacking& p = winograd.args.packing;
  const device::Properties& gpu = device::properties();
  c.stages = layout_of(p, 2).bytes <= gpu.shared_bytes ? 2 : 1;
  const Layout l = layout_of(p, c.stages);
  const int64_t tiles = set_3x3_tiles(c, batch, p.out_channels, {kHeight, kWidthLog2, kInputHeight, kInputWidth});
  c.pitch = l.pitch;
  c.stage_bytes = l.stage_bytes;
  c.weights_at = l.weights_at;
  c.zeros_at = l.zeros_at;
  winograd.args.results_at = l.results_at;
  winograd.shape.threads = kWinogradRows * p.groups * 32;
  winograd.shape.shared_bytes = l.bytes;
  winograd.shape.rows = p.blocks;
  winograd.shape.instance = p.tiles;
  const int64_t resident =
      std::max<int64_t>(1, std::min(2 / p.groups, gpu.shared_bytes_in_all / (l.bytes + kReserved)));
  winograd.shape.blocks = std::min<int64_t>(tiles, std::max<int64_t>(1, gpu.multiprocessors * resident / p.blocks));
}

void launch_winograd(const Winograd& w, device::Stream stream, bool overlap) {
  (w.precision == Precision::kFloat16 ? launch_winograd_float16 : launch_winograd_bfloat16)(w, stream, overlap);
}

}  // namespace esr::cuda
