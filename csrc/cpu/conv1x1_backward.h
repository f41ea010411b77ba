// Gradients of the 1x1 convolution to each input, to weight and bias, and to the residual where there is one, which is
// added before the activation; an empty tensor where none is wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace esr {

void conv1x1_backward(const torch::stable::Tensor& grad, const std::vector<torch::stable::Tensor>& xs,
                      const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias,
                      const std::optional<torch::stable::Tensor>& residual, int64_t activation, double slope,
                      const std::vector<torch::stable::Tensor>& gradients);

}  // namespace esr
