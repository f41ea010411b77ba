// Gradients of the blueprint-separable convolution to x, pointwise, depthwise and bias; an empty tensor where none is
// wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace esr {

void bsconv_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                     const torch::stable::Tensor& pointwise, const torch::stable::Tensor& depthwise,
                     const std::optional<torch::stable::Tensor>& bias,
                     const std::optional<torch::stable::Tensor>& residual, bool reflect, int64_t activation,
                     double slope, const std::vector<torch::stable::Tensor>& gradients);

}  // namespace esr
