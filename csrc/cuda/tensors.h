// Tensors as kernels see them, and the device they are on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "step.h"

namespace esr::cuda {

// A tensor's device and its current stream, for the duration of a call.
class DeviceScope {
 public:
#ifdef ESR_EMULATOR
  explicit DeviceScope(const torch::stable::Tensor&) {}
  device::Stream stream() const { return {}; }
#else
  explicit DeviceScope(const torch::stable::Tensor& t);
  device::Stream stream() const;

 private:
  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// What kernels may do with a tensor's memory. kShape: nothing, and its address is not asked for.
enum class Access { kShape, kRead, kWrite };

// Checks the tensor's device and dtype, and adds its memory to `memory`. Errors name it `what` `index`.
WeightView read_weight(const torch::stable::Tensor& t, const char* what, size_t index, Access access,
                       device::AllowedMemory& memory);
Weights read_weights(const std::vector<torch::stable::Tensor>& tensors, Access access, device::AllowedMemory& memory);

// An input or output of a run.
struct Outside {
  View view;
  Shape shape;
  int64_t batch = 0;
};

// The same for a map [N, C, H, W], which must have the precision's dtype.
Outside read_outside(const torch::stable::Tensor& t, const char* what, size_t index, Precision precision, Access access,
                     device::AllowedMemory& memory);

}  // namespace esr::cuda
