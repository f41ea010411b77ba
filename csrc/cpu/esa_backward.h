// Gradients of ESA to x and to its fourteen weights and biases in order (empty tensors where there is none); an empty
// tensor where no gradient is wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace esr {

void esa_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                  const std::vector<torch::stable::Tensor>& weights,
                  const std::vector<torch::stable::Tensor>& gradients);

}  // namespace esr
