// Parts of one block of memory, handed out before it exists.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <tuple>
#include <unordered_map>

#include "layout.h"

namespace esr {

// Hands out parts in the order of execution; what is given back is used again. Sizes and offsets are in any one unit.
class Arena {
 public:
  explicit Arena(int64_t alignment) : alignment_(alignment) {}

  int64_t take(int64_t size) {
    size = round_up(size, alignment_);
    auto best = free_.end();
    for (auto f = free_.begin(); f != free_.end(); ++f) {
      if (f->second >= size && (best == free_.end() || f->second < best->second)) best = f;
    }
    int64_t offset, part = size;
    if (best != free_.end()) {
      std::tie(offset, part) = *best;
      free_.erase(best);
      if (part > size) free_.emplace(offset + size, part - size);
    } else if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second == end_) {
      // The last part is free but too small: it grows.
      offset = free_.rbegin()->first;
      free_.erase(offset);
      end_ = offset + size;
    } else {
      offset = end_;
      end_ += size;
    }
    sizes_[offset] = size;
    most_ = std::max(most_, end_);
    return offset;
  }

  void give(int64_t offset) {
    auto added = free_.emplace(offset, sizes_.at(offset)).first;
    const auto next = std::next(added);
    if (next != free_.end() && added->first + added->second == next->first) {
      added->second += next->second;
      free_.erase(next);
    }
    if (added != free_.begin()) {
      const auto before = std::prev(added);
      if (before->first + before->second == added->first) {
        before->second += added->second;
        free_.erase(added);
      }
    }
  }

  // What the block must hold.
  int64_t size() const { return most_; }

 private:
  const int64_t alignment_;
  std::map<int64_t, int64_t> free_;  // offset -> size
  std::unordered_map<int64_t, int64_t> sizes_;
  int64_t end_ = 0, most_ = 0;
};

}  // namespace esr
