// Where values lie in one block of memory, from their sizes and lifetimes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
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

// Where a part goes among those that lie there, by their offsets: into the smallest gap between those that exist at the
// same time, else behind them.
inline int64_t find_place(const std::vector<Part>& parts, const std::vector<int64_t>& offsets,
                          const std::vector<size_t>& placed, size_t p, int64_t alignment) {
  const int64_t size = round_up(parts[p].size, alignment);
  int64_t end = 0, best = -1, best_gap = 0;
  for (const size_t q : placed) {
    if (parts[q].last < parts[p].first || parts[p].last < parts[q].first) continue;
    const int64_t gap = offsets[q] - end;
    if (gap >= size && (best < 0 || gap < best_gap)) {
      best = end;
      best_gap = gap;
    }
    end = std::max(end, offsets[q] + round_up(parts[q].size, alignment));
  }
  return best < 0 ? end : best;
}

// Puts it there.
inline void put(std::vector<int64_t>& offsets, std::vector<size_t>& placed, size_t p, int64_t offset) {
  offsets[p] = offset;
  const auto behind =
      std::upper_bound(placed.begin(), placed.end(), offset, [&](int64_t o, size_t q) { return o < offsets[q]; });
  placed.insert(behind, p);
}

// Every part in the given order.
inline Placement place_in_order(const std::vector<Part>& parts, const std::vector<size_t>& order, int64_t alignment) {
  Placement result;
  result.offsets.assign(parts.size(), 0);
  std::vector<size_t> placed;
  for (const size_t p : order) {
    put(result.offsets, placed, p, find_place(parts, result.offsets, placed, p, alignment));
    result.size = std::max(result.size, result.offsets[p] + round_up(parts[p].size, alignment));
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

// Memory outside the block that parts may lie in during some steps.
struct Room {
  int64_t size;
  int64_t first, last;  // both included
};

struct Spread {
  std::vector<int64_t> rooms;    // of every part; -1: the block
  std::vector<int64_t> offsets;  // of every part, in its room or in the block
  int64_t size = 0;              // what the block must hold
};

namespace placement {

// The most that exists at one time outside rooms, and the first step at which it does.
inline std::pair<int64_t, int64_t> fullest_step(const std::vector<Part>& parts, const std::vector<int64_t>& rooms) {
  std::vector<int64_t> changes;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (rooms[p] >= 0) continue;
    const size_t first = static_cast<size_t>(parts[p].first), end = static_cast<size_t>(parts[p].last) + 1;
    if (changes.size() <= end) changes.resize(end + 1, 0);
    changes[first] += parts[p].size;
    changes[end] -= parts[p].size;
  }
  int64_t sum = 0, most = 0, step = 0;
  for (size_t k = 0; k < changes.size(); ++k) {
    sum += changes[k];
    if (sum <= most) continue;
    most = sum;
    step = static_cast<int64_t>(k);
  }
  return {most, step};
}

// Where most exists at one time outside rooms, the first part in the given order for which there is place in one goes
// there, the smallest and shortest that has it, and so on while there is one. Those after the last that made the most
// less stay in the block, whose size is then that most, and in which nothing is placed yet.
inline Spread fill_rooms(const std::vector<Part>& parts, const std::vector<Room>& rooms,
                         const std::vector<size_t>& order, int64_t alignment) {
  Spread result;
  result.rooms.assign(parts.size(), -1);
  result.offsets.assign(parts.size(), 0);
  std::vector<std::vector<size_t>> placed(rooms.size());
  const auto use_of = [](const Room& r) { return std::pair(r.size, r.last - r.first); };
  const auto move = [&](size_t p) {
    int64_t& room = result.rooms[p];
    int64_t offset = 0;
    for (size_t r = 0; r < rooms.size(); ++r) {
      if (parts[p].first < rooms[r].first || parts[p].last > rooms[r].last) continue;
      if (room >= 0 && use_of(rooms[r]) >= use_of(rooms[static_cast<size_t>(room)])) continue;
      const int64_t found = find_place(parts, result.offsets, placed[r], p, alignment);
      if (found + parts[p].size > rooms[r].size) continue;
      room = static_cast<int64_t>(r);
      offset = found;
    }
    if (room >= 0) put(result.offsets, placed[static_cast<size_t>(room)], p, offset);
    return room >= 0;
  };
  auto [least, step] = fullest_step(parts, result.rooms);
  std::vector<int64_t> best = result.rooms;
  const auto moves = [&, &step = step](size_t p) {
    return result.rooms[p] < 0 && parts[p].first <= step && step <= parts[p].last && move(p);
  };
  while (std::any_of(order.begin(), order.end(), moves)) {
    const auto [most, next] = fullest_step(parts, result.rooms);
    step = next;
    if (most >= least) continue;
    least = most;
    best = result.rooms;
  }
  result.rooms = std::move(best);
  result.size = least;
  return result;
}

}  // namespace placement

// As place_parts, with rooms for some of the parts, where that makes the block smaller. Those that live longest are
// tried first, then the largest first, and some orders by chance, the same every time.
inline Spread spread_parts(const std::vector<Part>& parts, const std::vector<Room>& rooms, int64_t alignment) {
  constexpr size_t kByChance = 20, kWork = 4000;  // fewer where there are many parts
  std::vector<size_t> order;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].size > 0) order.push_back(p);
  }
  const auto age = [&](size_t p) { return parts[p].last - parts[p].first; };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(-age(a), -parts[a].size) < std::pair(-age(b), -parts[b].size);
  });
  Spread best = placement::fill_rooms(parts, rooms, order, alignment);
  const auto attempt = [&] {
    Spread found = placement::fill_rooms(parts, rooms, order, alignment);
    if (found.size < best.size) best = std::move(found);
  };
  if (!rooms.empty()) {
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::pair(-parts[a].size, -age(a)) < std::pair(-parts[b].size, -age(b));
    });
    attempt();
    std::minstd_rand chance;
    for (size_t k = 0; k < std::min(kByChance, kWork / (order.size() + 1)); ++k) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[chance() % i]);
      attempt();
    }
  }
  std::vector<Part> rest = parts;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (best.rooms[p] >= 0) rest[p].size = 0;
  }
  const Placement block = place_parts(rest, alignment);
  for (size_t p = 0; p < parts.size(); ++p) {
    if (best.rooms[p] < 0) best.offsets[p] = block.offsets[p];
  }
  best.size = block.size;
  return best;
}

}  // namespace esr
