#include "pointwise.h"

#include <algorithm>

#include "../common/layout.h"
#include "pixel.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 256;

// One item is eight channels of a pixel. Neighbouring lanes take what lies side by side in the output.
template <typename Value>
ESR_KERNEL(kThreads, 2)
pointwise_kernel(ESR_ARGUMENT(PointwiseArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const bool pixels_first = a.output.channel != static_cast<int64_t>(sizeof(Value));
  const int64_t stride = device::grid_size() * kThreads;
  for (int64_t i = device::block_index() * kThreads + device::thread_index(); i < a.items; i += stride) {
    int64_t row = i / (a.units * a.width);
    const int rest = static_cast<int>(i - row * (a.units * a.width));
    const int x = pixels_first ? rest % a.width : rest / a.units;
    const int c = (pixels_first ? rest / a.width : rest % a.units) * 8;
    const int64_t image = row / a.height;
    const int y = static_cast<int>(row - image * a.height);
    float values[8];
    read_channels<Value>(a.a, a.shuffle, image, y, x, c, a.channels, values);
    if (a.scale != nullptr) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (c + k < a.channels) {
          values[k] =
              (values[k] - device::load_global<float>(a.shift + c + k)) * device::load_global<float>(a.scale + c + k);
        }
      }
    }
    if (a.b.data != nullptr) {
      float other[8];
      read_channels<Value>(a.b, 1, image, y, x, c, a.channels, other);
#pragma unroll
      for (int k = 0; k < 8; ++k) values[k] += other[k];
    }
    write_channels<Value>(a.output, 1, image, y, x, c, a.channels, values);
  }
}

}  // namespace

void launch_pointwise(PointwiseArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  args.shuffle = std::max(args.shuffle, 1);
  args.units = static_cast<int32_t>(ceil_div(args.channels, 8));
  args.items = batch * args.height * args.width * args.units;
  device::LaunchShape shape;
  shape.threads = kThreads;
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  shape.blocks =
      std::min(ceil_div(args.items, kThreads), device::properties().multiprocessors * kBlocksPerMultiprocessor);
  switch (precision) {
    case Precision::kFloat16:
      return device::launch("pointwise", &pointwise_kernel<device::float16>, shape, stream, overlap, args);
    case Precision::kBFloat16:
      return device::launch("pointwise", &pointwise_kernel<device::bfloat16>, shape, stream, overlap, args);
    default:
      return device::launch("pointwise", &pointwise_kernel<float>, shape, stream, overlap, args);
  }
}

}  // namespace esr::cuda
