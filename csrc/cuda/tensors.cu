#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// In libtorch_cuda, which a process has only where torch has CUDA.
#ifndef ESR_EMULATOR
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace esr::cuda {

using device::AllowedMemory;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

ScalarType scalar_type(Precision p) {
  return p == Precision::kFloat16 ? ScalarType::Half
                                  : (p == Precision::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Float);
}

void check_device(const Tensor& t, const char* what, size_t index) {
#ifdef ESR_EMULATOR
  STD_TORCH_CHECK(t.is_cpu(), what, " ", index, " is not a CPU tensor");
#else
  STD_TORCH_CHECK(t.is_cuda() || device::rehearsing(), what, " ", index, " is not a CUDA tensor");
#endif
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided, what, " ", index, " is not a strided tensor");
}

// Bytes from the first element to behind the last.
int64_t extent(const Tensor& t) {
  int64_t last = 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return (last + 1) * static_cast<int64_t>(t.element_size());
}

}  // namespace

#ifndef ESR_EMULATOR
DeviceScope::DeviceScope(const Tensor& t) : index_(t.get_device_index()) {
  if (device::rehearsing()) return;
  int current = -1;
  cudaGetDevice(&current);
  if (current != index_) guard_.emplace(index_);
}

device::Stream DeviceScope::stream() const {
  if (device::rehearsing()) return {};
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
  return static_cast<device::Stream>(stream);
}
#endif

WeightView read_weight(const Tensor& t, const char* what, size_t index, Access access, AllowedMemory& memory) {
  check_device(t, what, index);
  WeightView w;
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, what, " ",
                  index, " has an unsupported dtype, allowed are float32, float16 and bfloat16");
  w.dtype =
      type == ScalarType::Float ? Dtype::kFloat32 : (type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16);
  STD_TORCH_CHECK(t.dim() <= 4, what, " ", index, " has ", t.dim(), " dimensions, allowed are up to 4");
  w.dimensions = static_cast<int32_t>(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) < INT32_MAX, what, " ", index, " is too large");
    w.sizes[d] = static_cast<int32_t>(t.size(d));
    w.strides[d] = t.stride(d);
  }
  if (access != Access::kShape) {
    w.data = static_cast<const unsigned char*>(access == Access::kWrite ? t.mutable_data_ptr() : t.const_data_ptr());
    memory.add(w.data, extent(t), access == Access::kWrite, what);
  }
  return w;
}

Weights read_weights(const std::vector<Tensor>& tensors, Access access, AllowedMemory& memory) {
  Weights weights;
  for (size_t i = 0; i < tensors.size(); ++i) weights.push_back(read_weight(tensors[i], "weight", i, access, memory));
  return weights;
}

Outside read_outside(const Tensor& t, const char* what, size_t index, Precision precision, Access access,
                     AllowedMemory& memory) {
  check_device(t, what, index);
  STD_TORCH_CHECK(t.scalar_type() == scalar_type(precision), what, " ", index,
                  " does not have the dtype that the plan was compiled for");
  STD_TORCH_CHECK(t.dim() == 4, what, " ", index, " has ", t.dim(), " dimensions, must have 4: [N, C, H, W]");
  Outside o;
  const auto sizes = t.sizes(), strides = t.strides();
  o.batch = sizes[0];
  o.shape = {sizes[1], sizes[2], sizes[3]};
  for (int d = 1; d < 4; ++d) {
    STD_TORCH_CHECK(sizes[d] < INT32_MAX / 2, what, " ", index, " is too large: size ", sizes[d], " in dimension ", d);
  }
  const int64_t bytes = value_bytes(precision);
  // The stride of a dimension of size 1 says nothing.
  const auto stride = [&](int d) { return sizes[d] == 1 ? 0 : strides[d] * bytes; };
  View& v = o.view;
  v.data = static_cast<unsigned char*>(access == Access::kWrite ? t.mutable_data_ptr()
                                                                : const_cast<void*>(t.const_data_ptr()));
  v.image = stride(0);
  v.channel = stride(1);
  v.row = stride(2);
  v.pixel = stride(3);
  v.channels = static_cast<int32_t>(sizes[1]);
  v.blocked = v.channel == bytes && (sizes[1] * bytes) % kUnitBytes == 0 && v.pixel % kUnitBytes == 0 &&
              v.row % kUnitBytes == 0 && v.image % kUnitBytes == 0 &&
              reinterpret_cast<uintptr_t>(v.data) % kUnitBytes == 0;
  memory.add(v.data, extent(t), access == Access::kWrite, what);
  return o;
}

}  // namespace esr::cuda
