#include "parts.h"

#include "../common/layout.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

constexpr int kStrands = 8;

// A block adds up 32 neighbouring channels of a set, every eighth part of them in a warp of its own.
ESR_KERNEL(kStrands * 32, 1) parts_kernel(ESR_ARGUMENT(PartsArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const int lane = device::thread_index() & 31, strand = device::thread_index() >> 5;
  const int set = device::block_row() % (a.taps + 1), group = device::block_row() / (a.taps + 1);
  const int channel = static_cast<int>(device::block_index()) * 32 + lane;
  const WeightView& to = set == a.taps ? a.bias : a.weight;
  if (to.data == nullptr) return;
  const int64_t part_pitch = int64_t{a.groups} * (a.taps + 1) * a.pitch;
  const float* from = a.partial + int64_t{device::block_row()} * a.pitch + channel;
  float sum = 0.0f;
  if (channel < a.channels) {
#pragma unroll 8
    for (int64_t part = strand; part < a.parts; part += kStrands) {
      sum += device::load_global<float>(from + part * part_pitch);
    }
  }
  auto* strands = reinterpret_cast<float*>(device::shared_memory());
  device::store_shared(strands + strand * 32 + lane, sum);
  device::sync_block();
  if (strand > 0 || channel >= a.channels) return;
  for (int s = 1; s < kStrands; ++s) sum += device::load_shared<float>(strands + s * 32 + lane);
  const int tap = set == a.taps ? 0 : set;
  write_weight(to, int64_t{group} * a.channels + channel, 0, tap / a.taps_across, tap % a.taps_across, sum);
}

}  // namespace

void launch_parts(const PartsArgs& args, device::Stream stream, bool overlap) {
  device::LaunchShape shape;
  shape.blocks = ceil_div(args.channels, 32);
  shape.rows = args.groups * (args.taps + 1);
  shape.threads = kStrands * 32;
  shape.shared_bytes = kStrands * 32 * 4;
  device::launch("parts", &parts_kernel, shape, stream, overlap, args);
}

}  // namespace esr::cuda
