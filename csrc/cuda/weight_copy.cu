#include "weight_copy.h"

#include "../common/layout.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 128;

struct WeightCopyArgs {
  WeightView weight;
  int64_t count;
  float* out;
};

ESR_KERNEL(kThreads, 1) weight_copy_kernel(ESR_ARGUMENT(WeightCopyArgs) a) {
  const int64_t i = device::block_index() * kThreads + device::thread_index();
  if (i >= a.count) return;
  const int64_t across = i % a.weight.sizes[3], rows = i / a.weight.sizes[3];
  const int64_t down = rows % a.weight.sizes[2], maps = rows / a.weight.sizes[2];
  const float value = read_weight(a.weight, maps / a.weight.sizes[1], maps % a.weight.sizes[1], static_cast<int>(down),
                                  static_cast<int>(across));
  device::store_global(a.out + i, value);
}

// A dimension of size 1 for each that is missing.
WeightView in_four_dimensions(WeightView w) {
  for (int d = w.dimensions; d < 4; ++d) w.sizes[d] = 1, w.strides[d] = 0;
  return w;
}

}  // namespace

void launch_weight_copy(const WeightView& weight, float* out, device::Stream stream) {
  WeightCopyArgs a = {in_four_dimensions(weight), 1, out};
  for (const int32_t size : a.weight.sizes) a.count *= size;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.blocks = ceil_div(a.count, kThreads);
  device::launch("weight_copy", &weight_copy_kernel, shape, stream, false, a);
}

WeightView copied_weight(const WeightView& weight, const unsigned char* out) {
  WeightView w = in_four_dimensions(weight);
  w.data = out;
  w.dtype = Dtype::kFloat32;
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    w.strides[d] = stride;
    stride *= w.sizes[d];
  }
  return w;
}

}  // namespace esr::cuda
