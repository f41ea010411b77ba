#include "layer_norm.h"

#include <algorithm>
#include <cmath>

#include "../common/layout.h"
#include "parts.h"
#include "pixel.h"
#include "weight_access.h"

namespace esr::cuda {
namespace {

constexpr int kThreads = 256;
// A unit is eight channels. So many threads share a pixel, each with a unit in registers; pixels of more units are
// normalised by more blocks, which read those of the others for their sums.
constexpr int kMostSlots = 32;

// Where a thread is in its block's tile of kThreads / slots pixels.
struct Place {
  int slot, pixel, pixels, pitch;
};

ESR_DEVICE Place find_place(const LayerNormArgs& a, bool pixels_first) {
  const int thread = device::thread_index(), pixels = kThreads / a.slots;
  // Neighbours in memory are neighbouring lanes; the pitch keeps a warp's values on different banks either way.
  return {pixels_first ? thread / pixels : thread % a.slots, pixels_first ? thread % pixels : thread / a.slots, pixels,
          pixels + 32 / a.slots};
}

// Adds up, in order, what the threads of a pixel have.
ESR_DEVICE float sum_slots(float value, const Place& at, int slots, float* shared) {
  device::store_shared(shared + at.slot * at.pitch + at.pixel, value);
  device::sync_block();
  float sum = 0.0f;
  for (int slot = 0; slot < slots; ++slot) sum += device::load_shared<float>(shared + slot * at.pitch + at.pixel);
  device::sync_block();  // before it is written again
  return sum;
}

// A pixel among those of all images.
struct Pixel {
  int64_t image;
  int y, x;
};

ESR_DEVICE Pixel find_pixel(int64_t i, int height, int width) {
  const int64_t row = i / width, image = row / height;
  return {image, static_cast<int>(row - image * height), static_cast<int>(i - row * width)};
}

// The sum over a pixel's units of `term(unit's first channel, its values)`; `own` are those of unit `mine`.
template <typename Value, typename Term>
ESR_DEVICE float sum_units(const LayerNormArgs& a, const View& map, const Pixel& p, bool exists, int slot, int mine,
                           const float (&own)[8], const Term& term) {
  float sum = 0.0f;
  if (!exists) return sum;
  for (int unit = slot; unit < a.units; unit += a.slots) {
    if (unit == mine) {
      sum += term(unit * 8, own);
    } else {
      float values[8];
      read_channels<Value>(map, 1, p.image, p.y, p.x, unit * 8, a.channels, values);
      sum += term(unit * 8, values);
    }
  }
  return sum;
}

// A pixel's mean and the reciprocal of its deviation.
struct Statistics {
  float mean, scale;
};

template <typename Value>
ESR_DEVICE Statistics find_statistics(const LayerNormArgs& a, const Pixel& p, bool exists, const Place& at, int mine,
                                      const float (&own)[8], float* shared) {
  const float count = static_cast<float>(a.channels);
  const float total = sum_units<Value>(a, a.input, p, exists, at.slot, mine, own, [&](int c, const float (&values)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += c + k < a.channels ? values[k] : 0.0f;
    return sum;
  });
  const float mean = sum_slots(total, at, a.slots, shared) / count;
  const float squares =
      sum_units<Value>(a, a.input, p, exists, at.slot, mine, own, [&](int c, const float (&values)[8]) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float centred = c + k < a.channels ? values[k] - mean : 0.0f;
          sum = fmaf(centred, centred, sum);
        }
        return sum;
      });
  return {mean, 1.0f / sqrtf(sum_slots(squares, at, a.slots, shared) / count + a.eps)};
}

// A unit's weights, or ones.
ESR_DEVICE void read_unit(const WeightView& w, int c, int channels, float none, float (&values)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = w.data != nullptr && c + k < channels ? read_weight(w, c + k, 0, 0) : none;
}

template <typename Value>
ESR_KERNEL(kThreads, 3)
layer_norm_kernel(ESR_ARGUMENT(LayerNormArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  auto* shared = reinterpret_cast<float*>(device::shared_memory());
  const Place at = find_place(a, a.input.channel != static_cast<int64_t>(sizeof(Value)));
  const int mine = device::block_row() * a.slots + at.slot, c = mine * 8;
  float weight[8], bias[8];
  read_unit(a.weight, c, a.channels, 1.0f, weight);
  read_unit(a.bias, c, a.channels, 0.0f, bias);
  const int64_t stride = device::grid_size() * at.pixels;
  for (int64_t first = device::block_index() * at.pixels; first < a.pixels; first += stride) {
    const bool exists = first + at.pixel < a.pixels;
    const Pixel p = find_pixel(exists ? first + at.pixel : first, a.height, a.width);
    float own[8] = {};
    if (exists && mine < a.units) read_channels<Value>(a.input, 1, p.image, p.y, p.x, c, a.channels, own);
    const Statistics s = find_statistics<Value>(a, p, exists, at, mine, own, shared);
    if (!exists || mine >= a.units) continue;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      own[k] = c + k < a.channels ? fmaf((own[k] - s.mean) * s.scale, weight[k], bias[k]) : 0.0f;
    }
    write_channels<Value>(a.output, 1, p.image, p.y, p.x, c, a.channels, own);
  }
}

template <typename Value>
ESR_KERNEL(kThreads, 2)
layer_norm_gradient_kernel(ESR_ARGUMENT(LayerNormGradientArgs) g) {
  const LayerNormArgs& a = g.forward;
  device::wait_for_previous_grid();
  device::allow_next_grid();
  auto* shared = reinterpret_cast<float*>(device::shared_memory());
  const Place at = find_place(a, a.input.channel != static_cast<int64_t>(sizeof(Value)));
  const int mine = device::block_row() * a.slots + at.slot, c = mine * 8;
  const float count = static_cast<float>(a.channels);
  float weight[8], to_weight[8] = {}, to_bias[8] = {};
  read_unit(a.weight, c, a.channels, 1.0f, weight);
  const int64_t stride = device::grid_size() * at.pixels;
  for (int64_t first = device::block_index() * at.pixels; first < a.pixels; first += stride) {
    const bool exists = first + at.pixel < a.pixels, owns = exists && mine < a.units;
    const Pixel p = find_pixel(exists ? first + at.pixel : first, a.height, a.width);
    float own[8] = {}, given[8] = {};
    if (owns) {
      read_channels<Value>(a.input, 1, p.image, p.y, p.x, c, a.channels, own);
      read_channels<Value>(g.given, 1, p.image, p.y, p.x, c, a.channels, given);
    }
    const Statistics s = find_statistics<Value>(a, p, exists, at, mine, own, shared);
    if (owns) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        to_weight[k] = fmaf(given[k], (own[k] - s.mean) * s.scale, to_weight[k]);
        to_bias[k] += given[k];
      }
    }
    if (a.output.data == nullptr) continue;
    // The gradient to the normalised value: its mean, and its mean product with that value.
    float mean = 0.0f, along = 0.0f;
    for (int unit = at.slot; exists && unit < a.units; unit += a.slots) {
      float x[8], gradient[8], factors[8];
      if (unit != mine) {
        read_channels<Value>(a.input, 1, p.image, p.y, p.x, unit * 8, a.channels, x);
        read_channels<Value>(g.given, 1, p.image, p.y, p.x, unit * 8, a.channels, gradient);
        read_unit(a.weight, unit * 8, a.channels, 1.0f, factors);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (unit * 8 + k >= a.channels) continue;
        const float value = unit == mine ? given[k] * weight[k] : gradient[k] * factors[k];
        mean += value;
        along = fmaf(value, ((unit == mine ? own[k] : x[k]) - s.mean) * s.scale, along);
      }
    }
    mean = sum_slots(mean, at, a.slots, shared) / count;
    along = sum_slots(along, at, a.slots, shared) / count;
    if (!owns) continue;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float value = (own[k] - s.mean) * s.scale;
      own[k] = c + k < a.channels ? s.scale * (given[k] * weight[k] - mean - value * along) : 0.0f;
    }
    write_channels<Value>(a.output, 1, p.image, p.y, p.x, c, a.channels, own);
  }
  if (g.partial == nullptr) return;
  // Pixel by pixel, in order; the weight's gradient, then the bias'.
  const int pitch = a.slots * 8 + 1;
#pragma unroll
  for (int set = 0; set < 2; ++set) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      device::store_shared(shared + at.pixel * pitch + at.slot * 8 + k, set == 0 ? to_weight[k] : to_bias[k]);
    }
    device::sync_block();
    const int channel = device::thread_index(), of_all = device::block_row() * a.slots * 8 + channel;
    if (channel < a.slots * 8 && of_all < a.channels) {
      float sum = 0.0f;
      for (int pixel = 0; pixel < at.pixels; ++pixel)
        sum += device::load_shared<float>(shared + pixel * pitch + channel);
      device::store_global(g.partial + (device::block_index() * 2 + set) * g.pitch + of_all, sum);
    }
    device::sync_block();
  }
}

device::LaunchShape divide(LayerNormArgs& a, int64_t batch) {
  a.pixels = batch * a.height * a.width;
  a.units = static_cast<int32_t>(ceil_div(a.channels, 8));
  a.slots = 1;
  while (a.slots < a.units && a.slots < kMostSlots) a.slots *= 2;
  device::LaunchShape shape;
  shape.threads = kThreads;
  shape.rows = static_cast<int>(ceil_div(a.units, a.slots));
  shape.blocks = ceil_div(a.pixels, kThreads / a.slots);
  shape.shared_bytes = (kThreads + 32) * 4;
  return shape;
}

// Parts of the gradients to weight and bias. It must not depend on the device: sums in another order are other results.
int64_t parts(int64_t tiles) {
  constexpr int64_t kMostParts = 512;
  return std::min(tiles, kMostParts);
}

}  // namespace

void launch_layer_norm(LayerNormArgs args, Precision precision, int64_t batch, device::Stream stream, bool overlap) {
  device::LaunchShape shape = divide(args, batch);
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  shape.blocks = std::min(shape.blocks, device::properties().multiprocessors * kBlocksPerMultiprocessor);
  with_value(precision, [&](auto value) {
    device::launch("layer_norm", &layer_norm_kernel<decltype(value)>, shape, stream, overlap, args);
  });
}

int64_t layer_norm_gradient_bytes(const LayerNormGradientArgs& args, int64_t batch) {
  LayerNormArgs a = args.forward;
  return parts(divide(a, batch).blocks) * 2 * round_up(a.channels, 8) * 4;
}

void launch_layer_norm_gradient(LayerNormGradientArgs args, Precision precision, int64_t batch,
                                unsigned char* workspace, device::Stream stream, bool overlap) {
  device::LaunchShape shape = divide(args.forward, batch);
  const LayerNormArgs& a = args.forward;
  const bool sums = args.to_weight.data != nullptr || args.to_bias.data != nullptr;
  shape.blocks = parts(shape.blocks);
  shape.shared_bytes = std::max(shape.shared_bytes, kThreads / a.slots * (a.slots * 8 + 1) * 4);
  args.partial = sums ? reinterpret_cast<float*>(workspace) : nullptr;
  args.pitch = static_cast<int32_t>(round_up(a.channels, 8));
  with_value(precision, [&](auto value) {
    device::launch("layer_norm_gradient", &layer_norm_gradient_kernel<decltype(value)>, shape, stream, overlap, args);
  });
  if (!sums) return;
  PartsArgs parts = {};
  parts.partial = args.partial;
  parts.parts = shape.blocks;
  parts.groups = parts.taps = parts.taps_across = 1;
  parts.channels = a.channels;
  parts.pitch = args.pitch;
  parts.weight = args.to_weight;
  parts.bias = args.to_bias;
  launch_parts(parts, stream, true);
}

}  // namespace esr::cuda
