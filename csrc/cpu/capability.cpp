#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace esr {
namespace {

// The compiler's checks include that the operating system saves the registers.
const Kernels* usable_avx2() {
#if defined(__x86_64__) || defined(__i386__)
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? kernels_avx2() : nullptr;
#else
  return nullptr;
#endif
}

#if defined(ESR_EMULATED_AVX512)

// For tests, which choose what they run.
const Kernels* usable_avx512() { return usable_avx2() == nullptr ? nullptr : kernels_avx512(); }
const Kernels* usable_amx() { return usable_avx2() == nullptr ? nullptr : kernels_amx(); }

#else

const Kernels* usable_avx512() {
#if defined(__x86_64__) || defined(__i386__)
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has ? kernels_avx512() : nullptr;
#else
  return nullptr;
#endif
}

// A process has to ask Linux for AMX's registers, once.
const Kernels* usable_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = [] {
    constexpr unsigned kBfloat512 = 1u << 5, kBfloatTiles = 1u << 22, kTiles = 1u << 24;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (usable_avx512() == nullptr) return false;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & kBfloat512) == 0) return false;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBfloatTiles) == 0 || (d & kTiles) == 0) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has ? kernels_amx() : nullptr;
#else
  return nullptr;
#endif
}

#endif

struct Path {
  const char* name;
  const Kernels* (*usable)();
};
constexpr Path kPaths[] = {
    {"amx", usable_amx}, {"avx512", usable_avx512}, {"avx2", usable_avx2}, {"plain", kernels_plain}};

const Kernels* by_name(const std::string& name) {
  std::string names;
  for (const Path& path : kPaths) {
    if (name == path.name) {
      const Kernels* const kernels = path.usable();
      STD_TORCH_CHECK(kernels != nullptr, "CPU capability: this CPU has no ", name);
      return kernels;
    }
    names += (names.empty() ? "" : ", ") + std::string(path.name);
  }
  STD_TORCH_CHECK(false, "CPU capability: '", name, "' is unknown, allowed are ", names);
}

const Kernels* initial() {
  const char* wanted = std::getenv("ESR_KERNELS_CPU_CAPABILITY");
  if (wanted != nullptr && *wanted != '\0') return by_name(wanted);
  for (const Path& path : kPaths) {
    if (const Kernels* const kernels = path.usable()) return kernels;
  }
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
