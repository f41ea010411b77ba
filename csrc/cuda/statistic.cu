#include "statistic.h"

#include <algorithm>
#include <cmath>

#include "../common/layout.h"
#include "pixel.h"
#include "teams_kernel.h"

namespace esr::cuda {
namespace {

// So many reads of a member are under way at once.
constexpr int kAhead = 4;
// Of an image, so that one block can bring them together with as many reads under way.
constexpr int64_t kMostParts = kAhead * kTeamThreads;

// What is gathered of pixels, as kernels' template argument.
constexpr int kSums = 0, kMoments = 1, kMaxima = 2;

constexpr int gathered_for(Statistic kind) {
  return kind == Statistic::kMean ? kSums : kind == Statistic::kMaximum ? kMaxima : kMoments;
}
constexpr int sets_of(int gathered) { return gathered == kMoments ? 2 : 1; }

// Eight channels of some pixels: sums, maxima, or means and the sums of squared differences from them. These are of
// what is left of values after the image's origin: a mean rounded to float32 would be too far off where values differ
// less than it does.
template <int kGathered>
struct Gathered {
  static constexpr int kSets = sets_of(kGathered);
  static constexpr int kWords = kSets * 8 + 1;  // in shared memory, for every thread

  float count;  // of the pixels
  float sets[kSets][8];

  ESR_DEVICE Gathered() : count(0.0f) {
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int k = 0; k < 8; ++k) sets[s][k] = kGathered == kMaxima ? -__builtin_inff() : 0.0f;
    }
  }

  // Takes in the first `known` of so many pixels, at least one.
  ESR_DEVICE void take(const float (&values)[kAhead][8], int known) {
    Gathered some;
    some.count = static_cast<float>(known);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if constexpr (kGathered == kMaxima) {
          take_larger(some.sets[0][k], i < known ? values[i][k] : some.sets[0][k]);
        } else {
          some.sets[0][k] += i < known ? values[i][k] : 0.0f;
        }
      }
    }
    if constexpr (kGathered == kMoments) {
      const float each = 1.0f / some.count;
#pragma unroll
      for (int k = 0; k < 8; ++k) some.sets[0][k] *= each;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float difference = i < known ? values[i][k] - some.sets[0][k] : 0.0f;
          some.sets[1][k] = fmaf(difference, difference, some.sets[1][k]);
        }
      }
    }
    fold(some);
  }

  // Takes in what was gathered of other pixels; squares as Chan, Golub and LeVeque (1979) bring them together.
  ESR_DEVICE void fold(const Gathered& other) {
    if (other.count == 0.0f) return;
    const float total = count + other.count, share = other.count / total, both = count * share;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if constexpr (kGathered == kSums) {
        sets[0][k] += other.sets[0][k];
      } else if constexpr (kGathered == kMaxima) {
        take_larger(sets[0][k], other.sets[0][k]);
      } else {
        const float apart = other.sets[0][k] - sets[0][k];
        sets[0][k] = fmaf(apart, share, sets[0][k]);
        sets[1][k] += fmaf(apart * both, apart, other.sets[1][k]);
      }
    }
    count = total;
  }

  // For another thread of the block.
  ESR_DEVICE void leave(unsigned char* shared, int i) const {
#pragma unroll
    for (int s = 0; s < kSets; ++s) leave_eight(shared + s * kTeamThreads * 32, i, sets[s]);
    device::store_shared(shared + kSets * kTeamThreads * 32 + i * 4, count);
  }
  static ESR_DEVICE Gathered left(const unsigned char* shared, int i) {
    Gathered g;
#pragma unroll
    for (int s = 0; s < kSets; ++s) take_eight(shared + s * kTeamThreads * 32, i, g.sets[s]);
    g.count = device::load_shared<float>(shared + kSets * kTeamThreads * 32 + i * 4);
    return g;
  }

  // In global memory, without the count.
  ESR_DEVICE void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kSets * 2; ++i) {
      const float* v = &sets[i / 2][i % 2 * 4];
      device::store_global(to + i * 4, U32x4{device::float_bits(v[0]), device::float_bits(v[1]),
                                             device::float_bits(v[2]), device::float_bits(v[3])});
    }
  }
  ESR_DEVICE void load(const float* from) {
#pragma unroll
    for (int i = 0; i < kSets * 2; ++i) {
      const auto bits = device::load_global<U32x4>(from + i * 4);
      float* v = &sets[i / 2][i % 2 * 4];
      v[0] = device::bits_float(bits.x), v[1] = device::bits_float(bits.y);
      v[2] = device::bits_float(bits.z), v[3] = device::bits_float(bits.w);
    }
  }

 private:
  // NaN is larger than every number.
  static ESR_DEVICE void take_larger(float& most, float value) { most = value > most || value != value ? value : most; }
};

// Brings together what a team's members have.
template <int kGathered>
ESR_DEVICE void fold_members(const Teams& t, const Membership& at, bool exists, Gathered<kGathered>& g) {
  unsigned char* const shared = device::shared_memory();
  fold_teams(
      t, at, exists, [&](int i) { g.leave(shared, i); }, [&](int i) { g.fold(Gathered<kGathered>::left(shared, i)); });
}

// A value like those of the image: the median of three pixels, so that none that stands out alone is taken.
template <typename Value>
ESR_DEVICE void find_origin(const StatisticArgs& a, int64_t image, int c, float (&values)[8]) {
  float middle[8], last[8];
  read_channels<Value>(a.input, 1, image, 0, 0, c, a.channels, values);
  read_channels<Value>(a.input, 1, image, a.height / 2, a.width / 2, c, a.channels, middle);
  read_channels<Value>(a.input, 1, image, a.height - 1, a.width - 1, c, a.channels, last);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float low = fminf(values[k], middle[k]), high = fmaxf(values[k], middle[k]);
    values[k] = fmaxf(low, fminf(high, last[k]));
  }
}

// The statistics of an image of which all was gathered.
template <typename Value, int kGathered>
ESR_DEVICE void write_statistic(const StatisticArgs& a, const Gathered<kGathered>& g, int64_t image, int c) {
  const float count = static_cast<float>(a.pixels), divisor = static_cast<float>(a.pixels - a.correction);
  float values[8], origin[8] = {};
  if (kGathered == kMoments && a.kind == Statistic::kContrast) find_origin<Value>(a, image, c, origin);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    values[k] = g.sets[0][k];
    if constexpr (kGathered == kSums) values[k] /= count;
    if constexpr (kGathered == kMoments) {
      const float variance = g.sets[1][k] / divisor;
      values[k] = a.kind == Statistic::kVariance ? variance : sqrtf(variance);
      if (a.kind == Statistic::kContrast) values[k] += origin[k] + g.sets[0][k];
    }
    values[k] = c + k < a.channels ? values[k] : 0.0f;
  }
  write_channels<Value>(a.output, 1, image, 0, 0, c, a.channels, values);
}

ESR_DEVICE float* partial_of(const StatisticArgs& a, int64_t image, int c, int part, int sets) {
  const int64_t units = ceil_div(a.channels, 8);
  return a.partial + ((image * units + c / 8) * a.parts + part) * (sets * 8);
}

// A team has eight channels of a part of an image.
template <typename Value, int kGathered>
ESR_KERNEL(kTeamThreads, 2)
statistic_parts_kernel(ESR_ARGUMENT(StatisticArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const Membership at = find_team(a.teams, a.input.channel != static_cast<int64_t>(sizeof(Value)));
  const int c = (device::block_row() * a.teams.units + at.unit) * 8;
  const int64_t stride = device::grid_size() * a.teams.windows;
  for (int64_t first = device::block_index() * a.teams.windows; first < a.windows; first += stride) {
    const int64_t window = first + at.window, image = window / a.parts;
    const int part = static_cast<int>(window - image * a.parts);
    const bool exists = at.exists && c < a.channels && window < a.windows;
    Gathered<kGathered> g;
    if (exists) {
      const int64_t begin = part * a.pixels_of_part;
      const int64_t end = begin + a.pixels_of_part < a.pixels ? begin + a.pixels_of_part : a.pixels;
      int64_t pixel = begin + at.member;
      const int64_t row = pixel / a.width;
      Walk next = {static_cast<int>(row), static_cast<int>(pixel - row * a.width), a.teams.members / a.width,
                   a.teams.members % a.width};
      const Window whole = {0, 0, a.height, a.width};
      float origin[8] = {};
      if constexpr (kGathered == kMoments) find_origin<Value>(a, image, c, origin);
      while (pixel < end) {
        float values[kAhead][8] = {};
        int known = 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (pixel < end) {
            read_channels<Value>(a.input, 1, image, next.y, next.x, c, a.channels, values[i]);
            ++known;
          }
          step(next, whole);
          pixel += a.teams.members;
        }
        if constexpr (kGathered == kMoments) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int k = 0; k < 8; ++k) values[i][k] -= origin[k];
          }
        }
        g.take(values, known);
      }
    }
    fold_members(a.teams, at, exists, g);
    if (!exists || at.member > 0) continue;
    if (a.parts == 1) {
      write_statistic<Value>(a, g, image, c);
    } else {
      g.store(partial_of(a, image, c, part, g.kSets));
    }
  }
}

// A team brings together all parts of eight channels of an image.
template <typename Value, int kGathered>
ESR_KERNEL(kTeamThreads, 2)
statistic_kernel(ESR_ARGUMENT(StatisticArgs) a) {
  device::wait_for_previous_grid();
  device::allow_next_grid();
  const Membership at = find_team(a.teams, false);
  const int c = device::block_row() * 8;
  const int64_t stride = device::grid_size() * a.teams.windows;
  for (int64_t first = device::block_index() * a.teams.windows; first < a.windows; first += stride) {
    const int64_t image = first + at.window;
    const bool exists = at.exists && image < a.windows;
    Gathered<kGathered> parts[kAhead];
    if (exists) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int part = at.member + i * a.teams.members;
        if (part >= a.parts) continue;
        parts[i].load(partial_of(a, image, c, part, parts[i].kSets));
        const int64_t rest = a.pixels - part * a.pixels_of_part;
        parts[i].count = static_cast<float>(rest < a.pixels_of_part ? rest : a.pixels_of_part);
      }
#pragma unroll
      for (int i = 1; i < kAhead; ++i) parts[0].fold(parts[i]);
    }
    fold_members(a.teams, at, exists, parts[0]);
    if (exists && at.member == 0) write_statistic<Value>(a, parts[0], image, c);
  }
}

// Cuts an image into parts, by its size alone. Every member of a team has a few pixels of one, or more where there
// would be too many parts.
void divide(StatisticArgs& a, int64_t batch) {
  a.pixels = int64_t{a.height} * a.width;
  a.teams = make_teams(a.channels, a.pixels);
  const int64_t few = int64_t{a.teams.members} * kAhead;
  // Twice as many cost less than a second launch.
  a.pixels_of_part = a.pixels <= 2 * few ? 2 * few : few * ceil_div(a.pixels, few * kMostParts);
  a.parts = static_cast<int32_t>(ceil_div(a.pixels, a.pixels_of_part));
  a.windows = batch * a.parts;
}

template <int kGathered, typename Value>
void launch_gathering(StatisticArgs a, int64_t batch, device::Stream stream, bool overlap) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const auto shape_of = [&] {
    device::LaunchShape shape;
    shape.threads = kTeamThreads;
    shape.rows = a.teams.slabs;
    shape.blocks =
        std::min(ceil_div(a.windows, a.teams.windows), device::properties().multiprocessors * kBlocksPerMultiprocessor);
    shape.instance = kGathered;
    shape.shared_bytes = team_bytes(a.teams, Gathered<kGathered>::kWords);
    return shape;
  };
  device::launch("statistic_parts", &statistic_parts_kernel<Value, kGathered>, shape_of(), stream, overlap, a);
  if (a.parts == 1) return;
  const int32_t members = std::min(a.parts, kTeamThreads);
  a.teams = {1, static_cast<int32_t>(ceil_div(a.channels, 8)), kTeamThreads / members, members};
  a.windows = batch;
  device::launch("statistic", &statistic_kernel<Value, kGathered>, shape_of(), stream, true, a);
}

}  // namespace

int64_t statistic_bytes(const StatisticArgs& args, int64_t batch) {
  if (args.height == 0 || args.width == 0) return 0;
  StatisticArgs a = args;
  divide(a, batch);
  const int64_t floats = a.windows * round_up(a.channels, 8) * sets_of(gathered_for(a.kind));
  return a.parts == 1 ? 0 : floats * 4;
}

void launch_statistic(StatisticArgs args, Precision precision, int64_t batch, unsigned char* workspace,
                      device::Stream stream, bool overlap) {
  divide(args, batch);
  args.partial = reinterpret_cast<float*>(workspace);
  with_value(precision, [&](auto value) {
    using Value = decltype(value);
    switch (gathered_for(args.kind)) {
      case kSums:
        return launch_gathering<kSums, Value>(args, batch, stream, overlap);
      case kMaxima:
        return launch_gathering<kMaxima, Value>(args, batch, stream, overlap);
      default:
        return launch_gathering<kMoments, Value>(args, batch, stream, overlap);
    }
  });
}

}  // namespace esr::cuda
