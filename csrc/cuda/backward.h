// What the operators' gradients have in common.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "sequence.h"

namespace esr::cuda {

// The tensors of one call: checked, and their memory allowed to kernels.
class Tensors {
 public:
  Tensors(const char* name, int64_t precision);

  const char* name() const { return name_; }
  Precision precision() const { return precision_; }
  int64_t batch() const { return batch_; }  // of the maps seen so far
  device::AllowedMemory& memory() { return memory_; }

  // A map; one without a shape may have any.
  Map map(const torch::stable::Tensor& t, const char* what, Access access = Access::kRead);
  Map map(const torch::stable::Tensor& t, const char* what, const Shape& shape, Access access = Access::kRead);
  // -1 stands for any size.
  WeightView weight(const torch::stable::Tensor& t, const char* what, const std::vector<int64_t>& shape,
                    Access access = Access::kRead);
  WeightView bias(const std::optional<torch::stable::Tensor>& t, const char* what, int64_t channels);

  // Where a gradient goes; data null where the tensor is empty: it is not wanted.
  WeightView to_weight(const torch::stable::Tensor& t, const char* what, const WeightView& like);
  WeightView to_bias(const torch::stable::Tensor& t, const char* what, int64_t channels);
  Map to_map(const torch::stable::Tensor& t, const char* what, const Shape& shape);

  void check_count(const std::vector<torch::stable::Tensor>& gradients, size_t count) const;

 private:
  const char* name_;
  const Precision precision_;
  device::AllowedMemory memory_;
  int64_t batch_ = -1;
};

// The activation with this code; errors name the operator.
Activation activation_of(const char* name, int64_t code);

// The gradient to a convolution's result before its activation and residual, from the one after them.
Map before_epilogue(Sequence& s, Convolve forward, const Map& g, const View& to_residual);

// The gradient to the input of a convolution without stride and with one input, whose result's is `g`; `c` may add an
// epilogue, its input, weight and padding are filled in.
void data_gradient(Sequence& s, const Convolve& forward, const Map& g, const Map& to_x, Convolve c = {});

}  // namespace esr::cuda
