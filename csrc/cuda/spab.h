// SPAN's block, three 3x3 convolutions, in one launch.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace esr::cuda {

// mid = silu(conv(x)); h = conv(silu(conv(mid))); out = (h + x) (sigmoid(h) - 0.5).
struct SpabArgs {
  // The third convolution, with x both its residual and the input that tiles are loaded from, three pixels wider than
  // they are on every side.
  ConvolutionArgs last;
  Packing packing;  // of each of the three
  int32_t steps;    // of its products
  const unsigned char* weights[3];
  const float* bias[3];
  View middle;  // data null: not wanted
  int32_t middle_channels;
  bool weights_stay;  // of all three; else of one at a time
  // In shared memory: the input, later the second convolution's results, lies at 0.
  int32_t inner_at;  // the first one's results
  int32_t weights_at, tables_at, zeros_at;
};

// What to compute; `prepare_spab` chooses tiles and shared memory for it.
struct Spab {
  SpabArgs args = {};
  bool large = false;
  device::LaunchShape shape;
};

// Whether there is a kernel, and room in shared memory, for convolutions of these packings.
bool plan_spab(const Packing& first, const Packing& second, const Packing& third);

// Fills in what follows from the packing, the sizes, and the device; the rest of `args` is the caller's.
void prepare_spab(Spab& spab, int64_t batch);

void launch_spab(const Spab& spab, device::Stream stream, bool overlap);

// A warp's products of 16 pixels of the k-th convolution's results, in tiles of 16x32 and, smaller, of 128 or 256
// pixels.
template <bool kLarge>
constexpr int spab_rows(int k) {
  return (kLarge ? 6 : 4) - k;
}
// Of 8 channels: published blocks have 20 to 52 channels; fewer are not worth a kernel.
inline constexpr int kFewestSpabTiles = 3;
// Most channels' sums leave no room for the products of a large tile.
inline constexpr int kMostLargeTiles = 6;

void launch_spab_float16(const Spab& spab, device::Stream stream, bool overlap);
void launch_spab_bfloat16(const Spab& spab, device::Stream stream, bool overlap);

}  // namespace esr::cuda
