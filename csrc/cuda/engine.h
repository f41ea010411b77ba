// Plans compiled for a CUDA device, and their execution as a sequence of launches on the current stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace esr::cuda {

// Parses and checks a program for weights and inputs of these shapes, and returns a handle (> 0). The weights' values
// do not matter. `precision` is view.h's Precision; `network`: weights are packed once for many runs.
int64_t compile_plan(const std::vector<int64_t>& program, const std::vector<double>& constants,
                     const std::vector<torch::stable::Tensor>& weights, const std::vector<int64_t>& input_channels,
                     int64_t precision, bool network);

// The weights, folded and packed for a plan: [bytes] uint8.
torch::stable::Tensor pack_plan(int64_t handle, const std::vector<torch::stable::Tensor>& weights);

// Runs a plan. Inputs and outputs are [N, C, H, W]; outputs are written completely and must not overlap anything.
void execute_plan(int64_t handle, const torch::stable::Tensor& packed, const std::vector<torch::stable::Tensor>& inputs,
                  const std::vector<torch::stable::Tensor>& outputs);

// The same with weights that are packed for this run only.
void run_plan(int64_t handle, const std::vector<torch::stable::Tensor>& weights,
              const std::vector<torch::stable::Tensor>& inputs, const std::vector<torch::stable::Tensor>& outputs);

// How a plan's layers are executed, a line each.
std::string describe_plan(int64_t handle);

// Forgets a plan; executions under way end normally.
void release_plan(int64_t handle);

}  // namespace esr::cuda
