// Compiled plans by handle.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace esr {

template <typename Plan>
class Registry {
 public:
  // Never destroyed: a plan may be released while the process ends.
  static Registry& instance() {
    static Registry* const registry = new Registry;
    return *registry;
  }

  int64_t add(std::shared_ptr<const Plan> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.emplace(++last_, std::move(plan));
    return last_;
  }

  std::shared_ptr<const Plan> get(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(handle);
    STD_TORCH_CHECK(found != plans_.end(), "there is no plan with handle ", handle);
    return found->second;
  }

  void remove(int64_t handle) {
    std::shared_ptr<const Plan> last_owner;  // destroyed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(handle);
    STD_TORCH_CHECK(found != plans_.end(), "there is no plan with handle ", handle);
    last_owner = std::move(found->second);
    plans_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans_;
  int64_t last_ = 0;
};

}  // namespace esr
