#include "adjoint.h"

#include <algorithm>

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

// Calls `function` with a value of the type that maps of this precision are of.
template <typename Function>
void with_value(Precision precision, const Function& function) {
  switch (precision) {
    case Precision::kFloat16:
      return function(device::float16{});
    case Precision::kBFloat16:
      return function(device::bfloat16{});
    default:
      return function(0.0f);
  }
}

}  // namespace

void launch_unpad(UnpadArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  args.units = static_cast<int32_t>(ceil_div(args.channels, 8));
  args.items = batch * args.height * args.width * args.units;
  with_value(precision, [&](auto value) {
    device::launch("unpad", &unpad_kernel<decltype(value)>, shape_for(args.items), stream, overlap, args);
  });
}

void launch_factors(const FactorsArgs& args, int64_t out_channels, device::Stream stream, bool overlap) {
  device::LaunchShape shape;
  shape.blocks = out_channels;
  shape.threads = 9 * 32;
  device::launch("factors", &factors_kernel, shape, stream, overlap, args);
}

}  // namespace esr::cuda
