// The Python module esr_kernels._build_info: what the compiler says of this build. Operators are not here: they are in
// the library that torch.ops.load_library loads, which knows no Python.

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <cstdlib>
#include <memory>
#include <string>

// Written by setup.py, and linked into the operator library as well.
extern "C" const char esr_kernels_build_information[];
// Written by nvcc_resources.py: JSON.
extern "C" const char esr_kernels_cuda_kernels[];

namespace {

#define ESR_STRING_(x) #x
#define ESR_STRING(x) ESR_STRING_(x)

pybind11::dict facts() {
  pybind11::dict result;
  result["cxx_standard"] = static_cast<long>(__cplusplus);
  result["compiler_macro"] = __VERSION__;
  result["python"] = PY_VERSION;
  result["pybind11"] =
      ESR_STRING(PYBIND11_VERSION_MAJOR) "." ESR_STRING(PYBIND11_VERSION_MINOR) "." ESR_STRING(PYBIND11_VERSION_PATCH);
  result["torch_headers"] =
      ESR_STRING(TORCH_VERSION_MAJOR) "." ESR_STRING(TORCH_VERSION_MINOR) "." ESR_STRING(TORCH_VERSION_PATCH);
  return result;
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status),
                                                    &std::free);
  return name == nullptr ? symbol : name.get();
}

pybind11::list kernels() {
  const pybind11::list result = pybind11::module_::import("json").attr("loads")(std::string(esr_kernels_cuda_kernels));
  for (const pybind11::handle kernel : result) kernel["name"] = demangled(kernel["symbol"].cast<std::string>());
  return result;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Build information of the compiled parts of esr_kernels.";
  m.def(
      "stamp", [] { return std::string(esr_kernels_build_information); },
      "The text setup.py wrote into the operator library and this module: a marker, then JSON.");
  m.def("facts", &facts, "What the compiler's own macros and the headers say, as a dict of str to str or int.");
  m.def("kernels", &kernels,
        "A dict for every CUDA kernel and architecture: symbol, name and architecture (str), registers, stack_bytes, "
        "spilled_bytes, static_shared_bytes and minimum_blocks (int), threads (int or None).");
}
