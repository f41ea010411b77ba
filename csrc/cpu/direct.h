// Operators that are limited by memory: no plan, no internal layout, each reads and writes the tensors where they are.
// x, the gradients and the results of a call have one memory format, NCHW rows or channels_last.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace esr {

// Depthwise convolution, documented in esr_kernels/functional.py; `activation` is an Activation.
void depthwise_conv(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                    const std::optional<torch::stable::Tensor>& bias, int64_t dilation, int64_t activation,
                    double slope, bool gated, const torch::stable::Tensor& out);

// Gradients to x, weight and bias; an empty tensor where none is wanted.
void depthwise_conv_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                             const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias,
                             int64_t dilation, int64_t activation, double slope, bool gated,
                             const std::vector<torch::stable::Tensor>& gradients);

// Layer normalisation over channels, documented in esr_kernels/functional.py.
void layer_norm2d(const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& weight,
                  const std::optional<torch::stable::Tensor>& bias, double eps, const torch::stable::Tensor& out);

// Gradients to x, weight and bias; an empty tensor where none is wanted.
void layer_norm2d_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                           const std::optional<torch::stable::Tensor>& weight, double eps,
                           const std::vector<torch::stable::Tensor>& gradients);

// Selective scan, documented in esr_kernels/functional.py. Tokens [N, L, D] come as [N, D, 1, L] with adjacent
// channels.
void selective_scan(const torch::stable::Tensor& u, const torch::stable::Tensor& delta, const torch::stable::Tensor& a,
                    const torch::stable::Tensor& b, const torch::stable::Tensor& c,
                    const std::optional<torch::stable::Tensor>& d, const std::optional<torch::stable::Tensor>& z,
                    const std::optional<torch::stable::Tensor>& delta_bias, bool delta_softplus,
                    const torch::stable::Tensor& out);

// Adaptive max pooling to the size of `out`, documented in esr_kernels/functional.py.
void adaptive_max_pool(const torch::stable::Tensor& x, const torch::stable::Tensor& out);

// The gradient to x; an empty tensor where it is not wanted.
void adaptive_max_pool_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                                const std::vector<torch::stable::Tensor>& gradients);

// x times the activated sum of resized maps, documented in esr_kernels/functional.py; the maps have the memory format
// of x.
void modulate(const torch::stable::Tensor& x, const std::vector<torch::stable::Tensor>& maps, bool bilinear,
              int64_t activation, double slope, const torch::stable::Tensor& out);

// Gradients to x and to each map; an empty tensor where none is wanted.
void modulate_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                       const std::vector<torch::stable::Tensor>& maps, bool bilinear, int64_t activation, double slope,
                       const std::vector<torch::stable::Tensor>& gradients);

// Attention inside windows, documented in esr_kernels/functional.py; `scales` has one for each head and takes the place
// of `scale`. Reads and writes tensors of any strides.
struct WindowAttention {
  torch::stable::Tensor q, k, v;
  std::optional<torch::stable::Tensor> bias, scales, residual;
  std::vector<int64_t> window;  // height and width
  int64_t heads = 1;
  double scale = 1.0;
  bool cosine = false;
  std::vector<int64_t> shift;  // down and right
  double mask = 0.0;
};
void window_attention(const WindowAttention& call, const torch::stable::Tensor& out);

}  // namespace esr
