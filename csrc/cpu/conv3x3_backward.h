// Gradients of the operators made of dense 3x3 convolutions. `gradients` are in the order of the forward's tensors, an
// empty one where none is wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace esr {

void conv3x3_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                      const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias,
                      const std::optional<torch::stable::Tensor>& residual, int64_t activation, double slope,
                      int64_t residual_mode, const std::vector<torch::stable::Tensor>& gradients);

// Three weights, three biases (empty tensors where there is none).
void spab_backward(const torch::stable::Tensor& grad, const std::optional<torch::stable::Tensor>& grad_mid,
                   const torch::stable::Tensor& x, const std::vector<torch::stable::Tensor>& weights,
                   const std::vector<torch::stable::Tensor>& biases,
                   const std::vector<torch::stable::Tensor>& gradients);

void conv3x3_pixel_shuffle_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                                    const torch::stable::Tensor& weight, int64_t upscale_factor,
                                    const std::vector<torch::stable::Tensor>& gradients);

}  // namespace esr
