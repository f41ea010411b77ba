// The CUDA engine's operators, registered with PyTorch's dispatcher; in the emulator under a namespace of its own.
#include "library.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "engine.h"

namespace esr::cuda {
namespace {

using torch::stable::Tensor;

int64_t compile(std::vector<int64_t> program, std::vector<double> constants, std::vector<Tensor> weights,
                std::vector<int64_t> input_channels, int64_t precision) {
  return compile_plan(program, constants, weights, input_channels, precision);
}

Tensor pack(int64_t handle, std::vector<Tensor> weights) { return pack_plan(handle, weights); }

void execute(int64_t handle, Tensor packed, std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  execute_plan(handle, packed, inputs, outputs);
}

void run(int64_t handle, std::vector<Tensor> weights, std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  run_plan(handle, weights, inputs, outputs);
}

void release(int64_t handle) { release_plan(handle); }

}  // namespace

STABLE_TORCH_LIBRARY(ESR_LIBRARY, m) {
  m.def("compile_plan(int[] program, float[] constants, Tensor[] weights, int[] input_channels, int precision) -> int");
  m.def("pack_plan(int handle, Tensor[] weights) -> Tensor");
  m.def("execute_plan(int handle, Tensor packed, Tensor[] inputs, Tensor(a!)[] outputs) -> ()");
  m.def("run_plan(int handle, Tensor[] weights, Tensor[] inputs, Tensor(a!)[] outputs) -> ()");
  m.def("release_plan(int handle) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ESR_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("compile_plan", TORCH_BOX(&compile));
  m.impl("pack_plan", TORCH_BOX(&pack));
  m.impl("execute_plan", TORCH_BOX(&execute));
  m.impl("run_plan", TORCH_BOX(&run));
  m.impl("release_plan", TORCH_BOX(&release));
}

}  // namespace esr::cuda
