#include "tensors.h"

#include <algorithm>
#include <string>

#include "../common/half.h"

namespace esr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string label(const char* what, int64_t index) {
  return index < 0 ? std::string(what) : std::string(what) + " " + std::to_string(index);
}

bool to_dtype(ScalarType type, Dtype* dtype) {
  switch (type) {
    case ScalarType::Float:
      *dtype = Dtype::kFloat32;
      return true;
    case ScalarType::Half:
      *dtype = Dtype::kFloat16;
      return true;
    case ScalarType::BFloat16:
      *dtype = Dtype::kBFloat16;
      return true;
    default:
      return false;
  }
}

Dtype check_tensor(const Tensor& t, const char* what, int64_t index) {
  STD_TORCH_CHECK(t.is_cpu(), label(what, index), " is not a CPU tensor");
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided, label(what, index), " is not a strided tensor");
  Dtype dtype;
  STD_TORCH_CHECK(to_dtype(t.scalar_type(), &dtype), label(what, index),
                  " has an unsupported dtype, allowed are float32, float16 and bfloat16");
  return dtype;
}

// Calls f(position in a contiguous tensor, offset in this one) for every element.
template <typename F>
void for_elements(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t count, const F& f) {
  std::vector<int64_t> position(sizes.size(), 0);
  int64_t offset = 0;
  for (int64_t i = 0; i < count; ++i) {
    f(i, offset);
    for (size_t d = sizes.size(); d-- > 0;) {
      offset += strides[d];
      if (++position[d] < sizes[d]) break;
      offset -= sizes[d] * strides[d];
      position[d] = 0;
    }
  }
}

template <typename T>
std::vector<int64_t> to_vector(const T& values) {
  return {values.begin(), values.end()};
}

}  // namespace

Weight read_weight(const Tensor& t, const char* what, int64_t index) {
  const Dtype dtype = check_tensor(t, what, index);
  Weight w;
  w.shape = to_vector(t.sizes());
  w.values.resize(static_cast<size_t>(t.numel()));
  const void* data = t.const_data_ptr();
  if (dtype == Dtype::kFloat32 && t.is_contiguous()) {
    const float* from = static_cast<const float*>(data);
    std::copy(from, from + w.values.size(), w.values.begin());
    return w;
  }
  for_elements(w.shape, to_vector(t.strides()), t.numel(), [&](int64_t i, int64_t offset) {
    if (dtype == Dtype::kFloat32) {
      w.values[i] = static_cast<const float*>(data)[offset];
    } else {
      const uint16_t bits = static_cast<const uint16_t*>(data)[offset];
      w.values[i] = dtype == Dtype::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
    }
  });
  return w;
}

void write_weight(const Tensor& t, const char* what, const std::vector<float>& values) {
  const Dtype dtype = check_tensor(t, what, -1);
  STD_TORCH_CHECK(t.numel() == static_cast<int64_t>(values.size()), what, " has ", t.numel(), " elements, must have ",
                  values.size());
  void* data = t.mutable_data_ptr();
  for_elements(to_vector(t.sizes()), to_vector(t.strides()), t.numel(), [&](int64_t i, int64_t offset) {
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(data)[offset] = values[i];
    } else {
      static_cast<uint16_t*>(data)[offset] =
          dtype == Dtype::kFloat16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
    }
  });
}

Batch read_batch(const Tensor& t, bool written, const char* what, int64_t index) {
  Batch b;
  b.first.dtype = check_tensor(t, what, index);
  STD_TORCH_CHECK(t.dim() == 4, label(what, index), " has ", t.dim(), " dimensions, must have 4: [N, C, H, W]");
  const auto sizes = t.sizes(), strides = t.strides();
  b.images = sizes[0];
  b.shape = {sizes[1], sizes[2], sizes[3]};
  b.image_stride = strides[0];
  b.first.channel_stride = strides[1];
  b.first.row_stride = strides[2];
  b.first.column_stride = strides[3];
  b.first.data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  return b;
}

}  // namespace esr
