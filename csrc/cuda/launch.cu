#include "launch.h"

#ifndef ESR_EMULATOR

#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#include "rehearsal.h"

namespace esr::device {
namespace {

constexpr int kMostDevices = 64;

struct Rehearsal {
  Properties device;
  std::ostringstream launches;
};
thread_local std::optional<Rehearsal> rehearsal;

int current_device() {
  int device = 0;
  detail::check(cudaGetDevice(&device), "cudaGetDevice");
  STD_TORCH_CHECK(device < kMostDevices, "CUDA device ", device, ": this library numbers them up to ",
                  kMostDevices - 1);
  return device;
}

}  // namespace

void begin_rehearsal(const Properties& device) {
  rehearsal.emplace();
  rehearsal->device = device;
}

std::string end_rehearsal() {
  STD_TORCH_CHECK(rehearsing(), "no rehearsal has begun");
  std::string launches = rehearsal->launches.str();
  rehearsal.reset();
  return launches;
}

bool rehearsing() { return rehearsal.has_value(); }

bool detail::rehearse(const char* name, const LaunchShape& shape) {
  if (!rehearsing()) return false;
  rehearsal->launches << name << ' ' << shape.instance << ' ' << shape.threads << ' ' << shape.rows << ' '
                      << shape.blocks << ' ' << shape.shared_bytes << '\n';
  return true;
}

const Properties& properties() {
  if (rehearsing()) return rehearsal->device;
  static std::array<Properties, kMostDevices> known;
  static std::mutex mutex;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  Properties& p = known[static_cast<size_t>(device)];
  if (p.capability == 0) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      detail::check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
      return value;
    };
    p.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
    p.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p.shared_bytes_in_all = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  }
  return p;
}

void detail::prepare(const void* kernel, const char* name, int shared_bytes) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (shared_bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> done;
  const std::pair<int, const void*> key{current_device(), kernel};
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.contains(key)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, properties().shared_bytes), name);
  done.insert(key);
}

void detail::check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error of this call must not be found by a later one
  STD_TORCH_CHECK(false, name, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

}  // namespace esr::device

#endif
