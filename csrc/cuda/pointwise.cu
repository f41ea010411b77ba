#include "pointwise.h"

#include <algorithm>

#include "../common/layout.h"
#include "epilogue.h"
#include "pixel.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 256;

// Zeros for low and high, as they are where a map has no channel, give zeros there.
ESR_DEVICE void apply(float (&x)[8], const float (&low)[8], const float (&high)[8], Function function) {
  switch (function) {
    default:
      activate(x, static_cast<Activation>(function), 0.0f);
      break;
    case Function::kLeakyRelu:
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = x[k] < 0.0f ? x[k] * low[k] : x[k];
      break;
    case Function::kSigmoid:
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = high[k] * sigmoid(x[k]);
      break;
    case Function::kClamp:
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        x[k] = x[k] < low[k] ? low[k] : x[k];  // NaN stays
        x[k] = x[k] > high[k] ? high[k] : x[k];
      }
      break;
    case Function::kHardswish:
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float gate = x[k] * (1.0f / 6.0f) + 0.5f;
        x[k] *= gate < 0.0f ? 0.0f : gate > 1.0f ? 1.0f : gate;
      }
      break;
    case Function::kMish:
      // tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), 1 in float32 from x = 9 on.
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float e = fast_exp(x[k] > 20.0f ? 20.0f : x[k]), n = e * (e + 2.0f);
        x[k] *= fast_divide(n, n + 2.0f);
      }
      break;
    case Function::kRsqrt:
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float root = sqrtf(x[k]), least = low[k] > 1e-30f ? low[k] : 1e-30f;
        x[k] = high[k] / (root < least ? least : root);  // NaN stays
      }
      break;
  }
}

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
    if (a.second != nullptr) {
      float first[8], second[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const bool known = c + k < a.channels;
        first[k] = known ? device::load_global<float>(a.first + c + k) : 0.0f;
        second[k] = known ? device::load_global<float>(a.second + c + k) : 0.0f;
      }
      if (a.function == Function::kNone) {
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] = (values[k] - first[k]) * second[k];
      } else {
        apply(values, first, second, a.function);
      }
    }
    if (a.b.data != nullptr) {
      float other[8];
      read_channels<Value>(a.b, 1, image, y, x, c, a.channels, other);
#pragma unroll
      for (int k = 0; k < 8; ++k) values[k] = a.multiplies ? values[k] * other[k] : values[k] + other[k];
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
