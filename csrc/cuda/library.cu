// The CUDA engine's operators, registered with PyTorch's dispatcher; in the emulator under a namespace of its own.
#include "library.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "engine.h"
#include "launch.h"
#include "rehearsal.h"

namespace esr::cuda {
namespace {

using torch::stable::Tensor;

int64_t compile(std::vector<int64_t> program, std::vector<double> constants, std::vector<Tensor> weights,
                std::vector<int64_t> input_channels, int64_t precision, bool network) {
  return compile_plan(program, constants, weights, input_channels, precision, network);
}

Tensor pack(int64_t handle, std::vector<Tensor> weights) { return pack_plan(handle, weights); }

void execute(int64_t handle, Tensor packed, std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  execute_plan(handle, packed, inputs, outputs);
}

void run(int64_t handle, std::vector<Tensor> weights, std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  run_plan(handle, weights, inputs, outputs);
}

std::string describe(int64_t handle) { return describe_plan(handle); }

#ifdef ESR_EMULATOR
// capability, multiprocessors, shared bytes of a block, of a multiprocessor
void set_properties(std::vector<int64_t> p) {
  STD_TORCH_CHECK(p.size() == 4, "set_properties takes 4 numbers");
  device::set_properties(
      {static_cast<int>(p[0]), static_cast<int>(p[1]), static_cast<int>(p[2]), static_cast<int>(p[3])});
}

std::string launches() { return device::launches(); }
#endif

void release(int64_t handle) { release_plan(handle); }

#ifndef ESR_EMULATOR
void begin_rehearsal(int64_t capability, int64_t multiprocessors, int64_t shared_bytes, int64_t shared_bytes_in_all) {
  device::begin_rehearsal({static_cast<int>(capability), static_cast<int>(multiprocessors),
                           static_cast<int>(shared_bytes), static_cast<int>(shared_bytes_in_all)});
}

std::string end_rehearsal() { return device::end_rehearsal(); }
#endif

}  // namespace

STABLE_TORCH_LIBRARY(ESR_LIBRARY, m) {
  m.def(
      "compile_plan(int[] program, float[] constants, Tensor[] weights, int[] input_channels, int precision, bool "
      "network=False) -> int");
  m.def("pack_plan(int handle, Tensor[] weights) -> Tensor");
  m.def("execute_plan(int handle, Tensor packed, Tensor[] inputs, Tensor(a!)[] outputs) -> ()");
  m.def("run_plan(int handle, Tensor[] weights, Tensor[] inputs, Tensor(a!)[] outputs) -> ()");
  m.def("describe_plan(int handle) -> str");
#ifdef ESR_EMULATOR
  m.def("set_properties(int[] properties) -> ()");
  // This thread's launches since the last call, a line each.
  m.def("launches() -> str");
#endif
  m.def("release_plan(int handle) -> ()");
#ifndef ESR_EMULATOR
  // What calls would launch on a device that is described (launch.h), for `esr_kernels.native.kernel_info`.
  m.def("begin_rehearsal(int capability, int multiprocessors, int shared_bytes, int shared_bytes_in_all) -> ()");
  m.def("end_rehearsal() -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(ESR_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("compile_plan", TORCH_BOX(&compile));
  m.impl("pack_plan", TORCH_BOX(&pack));
  m.impl("execute_plan", TORCH_BOX(&execute));
  m.impl("run_plan", TORCH_BOX(&run));
  m.impl("describe_plan", TORCH_BOX(&describe));
#ifdef ESR_EMULATOR
  m.impl("set_properties", TORCH_BOX(&set_properties));
  m.impl("launches", TORCH_BOX(&launches));
#endif
  m.impl("release_plan", TORCH_BOX(&release));
#ifndef ESR_EMULATOR
  m.impl("begin_rehearsal", TORCH_BOX(&begin_rehearsal));
  m.impl("end_rehearsal", TORCH_BOX(&end_rehearsal));
#endif
}

}  // namespace esr::cuda
