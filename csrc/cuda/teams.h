// A block's threads in teams: each has eight channels of a window of pixels, for maxima and sums over windows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/layout.h"

namespace esr::cuda {

inline constexpr int kTeamThreads = 256;

// Depends on sizes only, as the order of a sum does.
struct Teams {
  int32_t units;    // of eight channels, that a block has
  int32_t slabs;    // of so many units: rows of blocks
  int32_t windows;  // that a block has at a time
  int32_t members;  // threads of a team
};

// For windows of about so many pixels.
inline Teams make_teams(int64_t channels, int64_t pixels) {
  // 128 bytes of a pixel in half types; as many pixels as hide the latency of a read.
  constexpr int64_t kMostUnits = 8, kPixelsOfMember = 8;
  const int64_t all = ceil_div(channels, 8), slabs = ceil_div(all, kMostUnits), units = ceil_div(all, slabs);
  const int64_t most = kTeamThreads / units;
  const int64_t windows = most / std::min(ceil_div(pixels, kPixelsOfMember), most);
  return {static_cast<int32_t>(units), static_cast<int32_t>(slabs), static_cast<int32_t>(windows),
          static_cast<int32_t>(std::min(most / windows, pixels))};
}

// What `words` 32-bit words of every thread take in shared memory; a team of one needs none.
inline int team_bytes(const Teams& t, int words) { return t.members > 1 ? kTeamThreads * words * 4 : 0; }

}  // namespace esr::cuda
