// What kernels do with teams: who is in which, how members share a window, and how they bring together what they have.
#pragma once

#include "device.h"
#include "teams.h"
#include "view.h"

namespace esr::cuda {

// Which team a thread is of. The next member is `stride` threads further: neighbouring lanes have neighbouring units of
// a pixel or, where those are apart in memory, neighbouring pixels.
struct Membership {
  int window, unit, member, stride;
  bool exists;
};

ESR_DEVICE Membership find_team(const Teams& t, bool pixels_first) {
  const int thread = device::thread_index();
  const bool exists = thread < t.units * t.windows * t.members;
  if (pixels_first) {
    return {thread / t.members % t.windows, thread / (t.members * t.windows), thread % t.members, 1, exists};
  }
  return {thread / (t.units * t.members), thread % t.units, thread / t.units % t.members, t.units, exists};
}

// Folds what the members of each team have into the first one's: `write(i)` leaves what this thread has for thread i,
// `fold(i)` takes what thread i has left. Which pairs meet depends on the members' number only.
template <typename Write, typename Fold>
ESR_DEVICE void fold_teams(const Teams& t, const Membership& at, bool exists, const Write& write, const Fold& fold) {
  const int thread = device::thread_index();
  for (int count = t.members; count > 1;) {
    const int half = (count + 1) / 2;
    if (exists && at.member >= half && at.member < count) write(thread);
    device::sync_block();
    if (exists && at.member + half < count) fold(thread + half * at.stride);
    count = half;
  }
  if (t.members > 1) device::sync_block();  // before the memory is written again
}

// Eight words of thread i, in two halves whose 16 bytes lie on different banks for neighbouring threads.
ESR_DEVICE void leave_eight(unsigned char* shared, int i, const uint32_t (&words)[8]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    device::store_shared(shared + (h * kTeamThreads + i) * kUnitBytes,
                         device::U32x4{words[4 * h], words[4 * h + 1], words[4 * h + 2], words[4 * h + 3]});
  }
}
ESR_DEVICE void take_eight(const unsigned char* shared, int i, uint32_t (&words)[8]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto bits = device::load_shared<device::U32x4>(shared + (h * kTeamThreads + i) * kUnitBytes);
    words[4 * h] = bits.x, words[4 * h + 1] = bits.y, words[4 * h + 2] = bits.z, words[4 * h + 3] = bits.w;
  }
}
ESR_DEVICE void leave_eight(unsigned char* shared, int i, const float (&values)[8]) {
  uint32_t words[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) words[k] = device::float_bits(values[k]);
  leave_eight(shared, i, words);
}
ESR_DEVICE void take_eight(const unsigned char* shared, int i, float (&values)[8]) {
  uint32_t words[8];
  take_eight(shared, i, words);
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = device::bits_float(words[k]);
}

// A window of a map, and a member's way through it, row by row.
struct Window {
  int top, left, height, width;
};

struct Walk {
  int y, x;  // in the window
  int down, across;
};

ESR_DEVICE Walk begin_walk(const Window& w, int member, int members) {
  return {member / w.width, member % w.width, members / w.width, members % w.width};
}
ESR_DEVICE void step(Walk& at, const Window& w) {
  at.y += at.down;
  at.x += at.across;
  if (at.x >= w.width) at.x -= w.width, ++at.y;
}

// A window among those of all images.
struct WindowPlace {
  int64_t image;
  int row, column;
};

ESR_DEVICE WindowPlace find_window(int64_t i, int rows, int columns) {
  const int64_t row = i / columns, image = row / rows;
  return {image, static_cast<int>(row - image * rows), static_cast<int>(i - row * columns)};
}

}  // namespace esr::cuda
