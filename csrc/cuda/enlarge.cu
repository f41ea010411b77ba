#include "enlarge.h"

#include <algorithm>

#include "../common/layout.h"
#include "pixel.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 128;

ESR_DEVICE int within(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// One item is eight channels of a pixel of the result. Neighbouring lanes take what lies side by side in it.
template <typename Value>
ESR_KERNEL(kThreads, 6)
enlarge_kernel(ESR_ARGUMENT(EnlargeArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const bool pixels_first = a.output.channel != static_cast<int64_t>(sizeof(Value));
  const int height = a.height * a.factor, width = a.width * a.factor;
  const int64_t stride = device::grid_size() * kThreads, columns = int64_t{width} * a.units;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    const int64_t row = i / columns, image = row / height;
    const int rest = static_cast<int>(i - row * columns), y = static_cast<int>(row - image * height);
    const int x = pixels_first ? rest % width : rest / a.units;
    const int c = (pixels_first ? rest / width : rest % a.units) * 8;
    const ResizeTaps& down = a.taps[y % a.factor];
    const ResizeTaps& across = a.taps[x % a.factor];
    float sums[8] = {};
#pragma unroll 1
    for (int j = 0; j < down.count; ++j) {
      const int from_y = within(y / a.factor + down.first + j, a.height);
      float line[8] = {};
#pragma unroll 1
      for (int k = 0; k < across.count; ++k) {
        float values[8];
        read_channels<Value>(a.input, 1, image, from_y, within(x / a.factor + across.first + k, a.width), c, a.channels,
                             values);
#pragma unroll
        for (int n = 0; n < 8; ++n) line[n] = fmaf(across.weights[k], values[n], line[n]);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) sums[n] = fmaf(down.weights[j], line[n], sums[n]);
    }
    write_channels<Value>(a.output, 1, image, y, x, c, a.channels, sums);
  }
}

}  // namespace

void launch_enlarge(EnlargeArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  args.units = static_cast<int32_t>(ceil_div(args.channels, 8));
  args.items = batch * args.height * args.width * args.factor * args.factor * args.units;
  constexpr int64_t kBlocksPerMultiprocessor = 16;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks =
      std::min(ceil_div(args.items, kThreads), device::properties().multiprocessors * kBlocksPerMultiprocessor);
  with_value(precision, [&](auto value) {
    device::launch("enlarge", &enlarge_kernel<decltype(value)>, shape, stream, overlap, args);
  });
}

}  // namespace esr::cuda
