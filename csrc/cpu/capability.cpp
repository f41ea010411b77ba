#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>

namespace esr {
namespace {

// The compiler's checks include that the operating system saves the registers.
const Kernels* usable_avx512() {
#if defined(__x86_64__) || defined(__i386__)
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has ? kernels_avx512() : nullptr;
#else
  return nullptr;
#endif
}

const Kernels* usable_avx2() {
#if defined(__x86_64__) || defined(__i386__)
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? kernels_avx2() : nullptr;
#else
  return nullptr;
#endif
}

// What is emulated is for tests that ask for it.
const Kernels* usable_or_emulated_avx512() {
#if defined(ESR_EMULATED_AVX512)
  return usable_avx2() != nullptr ? kernels_avx512() : nullptr;
#else
  return usable_avx512();
#endif
}

const Kernels* by_name(const std::string& name) {
  const bool known = name == "avx512" || name == "avx2" || name == "plain";
  STD_TORCH_CHECK(known, "CPU capability: '", name, "' is unknown, allowed are avx512, avx2 and plain");
  const Kernels* kernels =
      name == "avx512" ? usable_or_emulated_avx512() : (name == "avx2" ? usable_avx2() : kernels_plain());
  STD_TORCH_CHECK(kernels != nullptr, "CPU capability: this CPU has no ", name);
  return kernels;
}

const Kernels* initial() {
  const char* wanted = std::getenv("ESR_KERNELS_CPU_CAPABILITY");
  if (wanted != nullptr && *wanted != '\0') return by_name(wanted);
  if (const Kernels* k = usable_avx512()) return k;
  if (const Kernels* k = usable_avx2()) return k;
  return kernels_plain();
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

void set_cpu_capability(const std::string& name) { chosen.store(by_name(name)); }

const Kernels& active_kernels() {
  const Kernels* kernels = chosen.load();
  if (kernels == nullptr) {
    kernels = initial();
    chosen.store(kernels);
  }
  return *kernels;
}

}  // namespace esr
