// Where values lie in one block of memory, from their sizes and lifetimes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "layout.h"

namespace esr {

struct Part {
  int64_t size;         // in any one unit; 0: takes no place
  int64_t first, last;  // the steps during which it must exist, both included
};

struct Placement {
  std::vector<int64_t> offsets;  // of every part, multiples of the alignment
  int64_t size = 0;              // what the block must hold
};

namespace placement {

// Every part in the given order: into the smallest gap between those that exist at the same time and are placed
// already, else behind them.
inline Placement place_in_order(const std::vector<Part>& parts, const std::vector<size_t>& order, int64_t alignment) {
  Placement result;
  result.offsets.assign(parts.size(), 0);
  std::vector<size_t> placed;  // by offset
  for (const size_t p : order) {
    const int64_t size = round_up(parts[p].size, alignment);
    int64_t end = 0, best = -1, best_gap = 0;
    for (const size_t q : placed) {
      if (parts[q].last < parts[p].first || parts[p].last < parts[q].first) continue;
      const int64_t gap = result.offsets[q] - end;
      if (gap >= size && (best < 0 || gap < best_gap)) {
        best = end;
        best_gap = gap;
      }
      end = std::max(end, result.offsets[q] + round_up(parts[q].size, alignment));
    }
    result.offsets[p] = best < 0 ? end : best;
    result.size = std::max(result.size, result.offsets[p] + size);
    const auto behind = std::upper_bound(placed.begin(), placed.end(), result.offsets[p],
                                         [&](int64_t offset, size_t q) { return offset < result.offsets[q]; });
    placed.insert(behind, p);
  }
  return result;
}

}  // namespace placement

// Parts that exist at the same time do not overlap. The smallest block is sought in three orders: by size, by length
// of life, and as they come to be. (The best block is a hard problem; by size it is nearly always as small as what
// exists at one time.)
inline Placement place_parts(const std::vector<Part>& parts, int64_t alignment) {
  std::vector<size_t> order;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].size > 0) order.push_back(p);
  }
  const auto age = [&](size_t p) { return parts[p].last - parts[p].first; };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return parts[a].first < parts[b].first; });
  Placement best = placement::place_in_order(parts, order, alignment);
  const auto attempt = [&](const auto& before) {
    std::stable_sort(order.begin(), order.end(), before);
    Placement found = placement::place_in_order(parts, order, alignment);
    if (found.size < best.size) best = std::move(found);
  };
  attempt([&](size_t a, size_t b) { return std::pair(-age(a), -parts[a].size) < std::pair(-age(b), -parts[b].size); });
  attempt([&](size_t a, size_t b) { return std::pair(-parts[a].size, -age(a)) < std::pair(-parts[b].size, -age(b)); });
  return best;
}

}  // namespace esr
