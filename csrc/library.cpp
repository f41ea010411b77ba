// The operators of the native CPU engine, registered with PyTorch's dispatcher; documented in cpu/engine.h and the
// headers beside it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/backward.h"
#include "cpu/bsconv_backward.h"
#include "cpu/capability.h"
#include "cpu/conv1x1_backward.h"
#include "cpu/conv3x3_backward.h"
#include "cpu/direct.h"
#include "cpu/engine.h"
#include "cpu/esa_backward.h"
#include "cpu/workspace.h"

namespace esr {
namespace {

using torch::stable::Tensor;

int64_t compile(std::vector<int64_t> program, std::vector<double> constants, std::vector<Tensor> weights) {
  return compile_plan(program, constants, weights);
}

void execute(int64_t handle, std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  execute_plan(handle, inputs, outputs, {});
}

void execute_over(int64_t handle, std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::vector<int64_t> spent,
                  std::vector<Tensor> lent) {
  execute_plan(handle, inputs, outputs, {spent, lent, true});
}

std::vector<int64_t> spans(int64_t handle) { return plan_spans(handle); }

void release(int64_t handle) { release_plan(handle); }

void set_capability(std::string name) { set_cpu_capability(name); }

std::string get_capability() { return active_kernels().name; }

void release_memory() { release_workspaces(); }

int64_t memory() { return workspace_bytes(); }

std::vector<int64_t> gradient_passes() { return passes(); }

using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

void conv3x3_gradients(Tensor grad, Tensor x, Tensor weight, Optional bias, Optional residual, int64_t activation,
                       double slope, int64_t residual_mode, Tensors gradients) {
  conv3x3_backward(grad, x, weight, bias, residual, activation, slope, residual_mode, gradients);
}

void spab_gradients(Tensor grad, Optional grad_mid, Tensor x, Tensors weights, Tensors biases, Tensors gradients) {
  spab_backward(grad, grad_mid, x, weights, biases, gradients);
}

void conv1x1_gradients(Tensor grad, Tensors xs, Tensor weight, Optional bias, Optional residual, int64_t activation,
                       double slope, Tensors gradients) {
  conv1x1_backward(grad, xs, weight, bias, residual, activation, slope, gradients);
}

void esa_gradients(Tensor grad, Tensor x, Tensors weights, Tensors gradients) {
  esa_backward(grad, x, weights, gradients);
}

void bsconv_gradients(Tensor grad, Tensor x, Tensor pointwise, Tensor depthwise, Optional bias, Optional residual,
                      bool reflect, int64_t activation, double slope, Tensors gradients) {
  bsconv_backward(grad, x, pointwise, depthwise, bias, residual, reflect, activation, slope, gradients);
}

void shuffle_gradients(Tensor grad, Tensor x, Tensor weight, int64_t upscale_factor, Tensors gradients) {
  conv3x3_pixel_shuffle_backward(grad, x, weight, upscale_factor, gradients);
}

// Operators of one result take it in a list, as the others take their gradients.
const Tensor& only(const char* name, const Tensors& outputs) {
  STD_TORCH_CHECK(outputs.size() == 1, name, ": ", outputs.size(), " results given, must be 1");
  return outputs[0];
}

void run_depthwise_conv(Tensor x, Tensor weight, Optional bias, int64_t dilation, int64_t activation, double slope,
                        bool gated, Tensors outputs) {
  depthwise_conv(x, weight, bias, dilation, activation, slope, gated, only("depthwise_conv", outputs));
}

void depthwise_conv_gradients(Tensor grad, Tensor x, Tensor weight, Optional bias, int64_t dilation, int64_t activation,
                              double slope, bool gated, Tensors gradients) {
  depthwise_conv_backward(grad, x, weight, bias, dilation, activation, slope, gated, gradients);
}

void run_layer_norm2d(Tensor x, Optional weight, Optional bias, double eps, Tensors outputs) {
  layer_norm2d(x, weight, bias, eps, only("layer_norm2d", outputs));
}

void layer_norm2d_gradients(Tensor grad, Tensor x, Optional weight, double eps, Tensors gradients) {
  layer_norm2d_backward(grad, x, weight, eps, gradients);
}

void run_selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Optional d, Optional z,
                        Optional delta_bias, bool delta_softplus, Tensors outputs) {
  selective_scan(u, delta, a, b, c, d, z, delta_bias, delta_softplus, only("selective_scan", outputs));
}

void run_adaptive_max_pool(Tensor x, Tensors outputs) { adaptive_max_pool(x, only("adaptive_max_pool", outputs)); }

void adaptive_max_pool_gradients(Tensor grad, Tensor x, Tensors gradients) {
  adaptive_max_pool_backward(grad, x, gradients);
}

void run_modulate(Tensor x, Tensors maps, bool bilinear, int64_t activation, double slope, Tensors outputs) {
  modulate(x, maps, bilinear, activation, slope, only("modulate", outputs));
}

void modulate_gradients(Tensor grad, Tensor x, Tensors maps, bool bilinear, int64_t activation, double slope,
                        Tensors gradients) {
  modulate_backward(grad, x, maps, bilinear, activation, slope, gradients);
}

void run_window_attention(Tensor q, Tensor k, Tensor v, Optional bias, Optional scales, Optional residual,
                          std::vector<int64_t> window, int64_t heads, double scale, bool cosine,
                          std::vector<int64_t> shift, double mask, Tensors outputs) {
  window_attention({q, k, v, bias, scales, residual, window, heads, scale, cosine, shift, mask},
                   only("window_attention", outputs));
}

}  // namespace

STABLE_TORCH_LIBRARY(esr_native, m) {
  m.def("compile_plan(int[] program, float[] constants, Tensor[] weights) -> int");
  m.def("execute_plan(int handle, Tensor[] inputs, Tensor(a!)[] outputs) -> ()");
  // Owns the storages of outputs, of spent inputs and of what is lent, and writes all over them.
  m.def("execute_plan_over(int handle, Tensor[] inputs, Tensor(a!)[] outputs, int[] spent, Tensor[] lent) -> ()");
  m.def("plan_spans(int handle) -> int[]");
  m.def("release_plan(int handle) -> ()");
  m.def("set_cpu_capability(str name) -> ()");
  m.def("get_cpu_capability() -> str");
  m.def("release_workspaces() -> ()");
  m.def("workspace_bytes() -> int");
  m.def("passes() -> int[]");
  m.def(
      "conv3x3_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "float slope, int residual_mode, Tensor(a!)[] gradients) -> ()");
  m.def(
      "spab_backward(Tensor grad, Tensor? grad_mid, Tensor x, Tensor[] weights, Tensor[] biases, "
      "Tensor(a!)[] gradients) -> ()");
  m.def(
      "conv3x3_pixel_shuffle_backward(Tensor grad, Tensor x, Tensor weight, int upscale_factor, "
      "Tensor(a!)[] gradients) -> ()");
  m.def(
      "conv1x1_backward(Tensor grad, Tensor[] xs, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "float slope, Tensor(a!)[] gradients) -> ()");
  m.def("esa_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor(a!)[] gradients) -> ()");
  m.def(
      "bsconv_backward(Tensor grad, Tensor x, Tensor pointwise, Tensor depthwise, Tensor? bias, Tensor? residual, "
      "bool reflect, int activation, float slope, Tensor(a!)[] gradients) -> ()");
  m.def(
      "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, int dilation, int activation, float slope, bool gated, "
      "Tensor(a!)[] outputs) -> ()");
  m.def(
      "depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int dilation, int activation, "
      "float slope, bool gated, Tensor(a!)[] gradients) -> ()");
  m.def("layer_norm2d(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!)[] outputs) -> ()");
  m.def("layer_norm2d_backward(Tensor grad, Tensor x, Tensor? weight, float eps, Tensor(a!)[] gradients) -> ()");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? delta_bias, "
      "bool delta_softplus, Tensor(a!)[] outputs) -> ()");
  m.def("adaptive_max_pool(Tensor x, Tensor(a!)[] outputs) -> ()");
  m.def("adaptive_max_pool_backward(Tensor grad, Tensor x, Tensor(a!)[] gradients) -> ()");
  m.def("modulate(Tensor x, Tensor[] maps, bool bilinear, int activation, float slope, Tensor(a!)[] outputs) -> ()");
  m.def(
      "modulate_backward(Tensor grad, Tensor x, Tensor[] maps, bool bilinear, int activation, float slope, "
      "Tensor(a!)[] gradients) -> ()");
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? scales, Tensor? residual, int[] window, "
      "int heads, float scale, bool cosine, int[] shift, float mask, Tensor(a!)[] outputs) -> ()");
}

// Not the CPU key: most of these take no tensor, and one on another device is to get a message of ours.
STABLE_TORCH_LIBRARY_IMPL(esr_native, CompositeExplicitAutograd, m) {
  m.impl("compile_plan", TORCH_BOX(&compile));
  m.impl("execute_plan", TORCH_BOX(&execute));
  m.impl("execute_plan_over", TORCH_BOX(&execute_over));
  m.impl("plan_spans", TORCH_BOX(&spans));
  m.impl("release_plan", TORCH_BOX(&release));
  m.impl("set_cpu_capability", TORCH_BOX(&set_capability));
  m.impl("get_cpu_capability", TORCH_BOX(&get_capability));
  m.impl("release_workspaces", TORCH_BOX(&release_memory));
  m.impl("workspace_bytes", TORCH_BOX(&memory));
  m.impl("passes", TORCH_BOX(&gradient_passes));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_gradients));
  m.impl("spab_backward", TORCH_BOX(&spab_gradients));
  m.impl("conv3x3_pixel_shuffle_backward", TORCH_BOX(&shuffle_gradients));
  m.impl("conv1x1_backward", TORCH_BOX(&conv1x1_gradients));
  m.impl("esa_backward", TORCH_BOX(&esa_gradients));
  m.impl("bsconv_backward", TORCH_BOX(&bsconv_gradients));
  m.impl("depthwise_conv", TORCH_BOX(&run_depthwise_conv));
  m.impl("depthwise_conv_backward", TORCH_BOX(&depthwise_conv_gradients));
  m.impl("layer_norm2d", TORCH_BOX(&run_layer_norm2d));
  m.impl("layer_norm2d_backward", TORCH_BOX(&layer_norm2d_gradients));
  m.impl("selective_scan", TORCH_BOX(&run_selective_scan));
  m.impl("adaptive_max_pool", TORCH_BOX(&run_adaptive_max_pool));
  m.impl("adaptive_max_pool_backward", TORCH_BOX(&adaptive_max_pool_gradients));
  m.impl("modulate", TORCH_BOX(&run_modulate));
  m.impl("modulate_backward", TORCH_BOX(&modulate_gradients));
  m.impl("window_attention", TORCH_BOX(&run_window_attention));
}

}  // namespace esr
