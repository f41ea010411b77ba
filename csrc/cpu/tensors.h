// Outside tensors: checked, and as something with a pointer and strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "operator.h"

namespace esr {

// A weight tensor of any strides; messages call it `what`, with its index unless that is -1.
Weight read_weight(const torch::stable::Tensor& t, const char* what, int64_t index = -1);

// Writes contiguous values to a tensor of any strides, rounded to its dtype.
void write_weight(const torch::stable::Tensor& t, const char* what, const std::vector<float>& values);

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// All images of a [N, C, H, W] tensor.
struct Batch {
  int64_t images = 0;
  Shape shape;
  TensorView first;
  int64_t image_stride = 0;

  // Whether its rows are rows of pixels of one channel, not of pixels with all their channels: of any strides as
  // memory_format in esr_kernels/library.py has it, by which the results are laid out.
  bool is_planar() const {
    const int64_t pixel_stride = shape.width > 1 ? first.column_stride : first.row_stride;
    return shape.channels == 1 || shape.height * shape.width == 1 || first.channel_stride != 1 ||
           pixel_stride < shape.channels;
  }
  // Whether it can be read in this way; of what there is one only, the stride is anything.
  bool can_be(bool planar) const {
    return planar ? first.column_stride == 1 || shape.width == 1 : first.channel_stride == 1 || shape.channels == 1;
  }

  TensorView image(int64_t n) const {
    TensorView v = first;
    v.data = static_cast<char*>(first.data) + n * image_stride * bytes_of(v.dtype);
    return v;
  }
};

Batch read_batch(const torch::stable::Tensor& t, bool written, const char* what, int64_t index = -1);

}  // namespace esr
