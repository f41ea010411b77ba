// Compiled plans and their execution.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace esr {

// Parses and checks a program, packs its weights for the active kernels and returns a handle (> 0).
int64_t compile_plan(const std::vector<int64_t>& program, const std::vector<double>& constants,
                     const std::vector<torch::stable::Tensor>& weights);

struct Ownership {
  std::vector<int64_t> spent;               // indices of inputs that nobody reads afterwards: what is in them is lost
  std::vector<torch::stable::Tensor> lent;  // more memory for maps, as [N, C, H, W]
  bool storages = false;  // nothing else is in the storages of outputs, spent inputs and lent ones; they may be larger
};

// Runs a plan. Inputs and outputs are [N, C, H, W]; outputs are written completely and must not overlap anything, but
// one may be a spent input where plan_spans allows it. Before they are written they hold maps.
void execute_plan(int64_t handle, const std::vector<torch::stable::Tensor>& inputs,
                  const std::vector<torch::stable::Tensor>& outputs, const Ownership& owned);

// The last layer that reads each input, then the first that writes each output, then for each output and each input
// whether the one may be the other (1 or 0).
std::vector<int64_t> plan_spans(int64_t handle);

// Forgets a plan; executions under way end normally.
void release_plan(int64_t handle);

}  // namespace esr
