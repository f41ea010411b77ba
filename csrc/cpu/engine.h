// Compiled plans and their execution.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace esr {

// Parses and checks a program, packs its weights for the active kernels and returns a handle (> 0).
int64_t compile_plan(const std::vector<int64_t>& program, const std::vector<double>& constants,
                     const std::vector<torch::stable::Tensor>& weights);

// Runs a plan. Inputs and outputs are [N, C, H, W]; outputs are written completely and must not overlap anything.
void execute_plan(int64_t handle, const std::vector<torch::stable::Tensor>& inputs,
                  const std::vector<torch::stable::Tensor>& outputs);

// Forgets a plan; executions under way end normally.
void release_plan(int64_t handle);

}  // namespace esr
