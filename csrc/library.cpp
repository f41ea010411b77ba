// The operators of the native CPU engine, registered with PyTorch's dispatcher; documented in cpu/engine.h and the
// headers beside it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "cpu/capability.h"
#include "cpu/engine.h"
#include "cpu/workspace.h"

namespace esr {
namespace {

using torch::stable::Tensor;

int64_t compile(std::vector<int64_t> program, std::vector<double> constants, std::vector<Tensor> weights) {
  return compile_plan(program, constants, weights);
}

void execute(int64_t handle, std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  execute_plan(handle, inputs, outputs);
}

void release(int64_t handle) { release_plan(handle); }

void set_capability(std::string name) { set_cpu_capability(name); }

std::string get_capability() { return active_kernels().name; }

void release_memory() { release_workspaces(); }

int64_t memory() { return workspace_bytes(); }

}  // namespace

STABLE_TORCH_LIBRARY(esr_native, m) {
  m.def("compile_plan(int[] program, float[] constants, Tensor[] weights) -> int");
  m.def("execute_plan(int handle, Tensor[] inputs, Tensor(a!)[] outputs) -> ()");
  m.def("release_plan(int handle) -> ()");
  m.def("set_cpu_capability(str name) -> ()");
  m.def("get_cpu_capability() -> str");
  m.def("release_workspaces() -> ()");
  m.def("workspace_bytes() -> int");
}

// Not the CPU key: most of these take no tensor, and one on another device is to get a message of ours.
STABLE_TORCH_LIBRARY_IMPL(esr_native, CompositeExplicitAutograd, m) {
  m.impl("compile_plan", TORCH_BOX(&compile));
  m.impl("execute_plan", TORCH_BOX(&execute));
  m.impl("release_plan", TORCH_BOX(&release));
  m.impl("set_cpu_capability", TORCH_BOX(&set_capability));
  m.impl("get_cpu_capability", TORCH_BOX(&get_capability));
  m.impl("release_workspaces", TORCH_BOX(&release_memory));
  m.impl("workspace_bytes", TORCH_BOX(&memory));
}

}  // namespace esr
