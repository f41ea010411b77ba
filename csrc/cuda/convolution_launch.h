// Which instantiation of the convolution kernel a convolution takes.
#pragma once

#include <utility>

#include "convolution_kernel.h"
#include "convolution_kernels.h"

namespace esr::cuda {

template <typename P, Variant kVariant, int... kIndex>
auto instance(int channel_tiles, std::integer_sequence<int, kIndex...>) {
  constexpr void (*kInstances[])(ConvolutionArgs) = {&convolution_kernel<P, kIndex + 1, kVariant>...};
  return kInstances[channel_tiles - 1];
}

template <typename P, Variant kVariant>
void launch_instance(const char* name, const Convolution& c, device::Stream stream, bool overlap) {
  const auto kernel = instance<P, kVariant>(c.packing.channel_tiles, std::make_integer_sequence<int, kMostTiles>());
  device::launch(name, kernel, c.shape, stream, overlap, c.args);
}

}  // namespace esr::cuda
