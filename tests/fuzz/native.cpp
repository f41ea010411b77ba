// What the fuzzers call: the entry points of the native library that take apart what they are given. Any input must end
// in a result that holds what the code promises, or in one exception.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/placement.h"
#include "common/plan.h"
#include "cpu/packing.h"

namespace {

#define PROMISE(condition)                                                                 \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                        \
    }                                                                                      \
  } while (false)

// Numbers from the bytes of an input, zeros after its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  bool empty() const { return data_ == end_; }
  uint8_t byte() { return empty() ? 0 : *data_++; }
  int64_t below(int64_t limit) { return byte() % limit; }

  // Small numbers mostly, and the ends of the types.
  int64_t integer() {
    const uint8_t b = byte();
    if (b < 240) return static_cast<int64_t>(b) - 2;
    constexpr int64_t kFar[] = {INT64_MIN, INT64_MIN + 1, INT64_MAX,     INT64_MAX - 1, INT32_MIN, INT32_MAX,
                                1 << 16,   -(1 << 16),    1LL << 32,     -(1LL << 32),  1LL << 62, -(1LL << 62),
                                1024,      1025,          INT64_MIN / 2, 4096};
    return kFar[b - 240];
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};

void fuzz_program(Bytes in) {
  const int64_t weights = in.below(20);
  std::vector<double> constants(static_cast<size_t>(in.below(16)));
  for (double& c : constants) c = static_cast<double>(in.integer());
  std::vector<int64_t> program;
  while (!in.empty()) program.push_back(in.integer());
  esr::Program p;
  try {
    p = esr::ProgramReader(program, constants, weights).read();
  } catch (const std::runtime_error&) {
    return;
  }
  PROMISE(p.inputs >= 1 && !p.layers.empty() && !p.outputs.empty());
  int64_t value = p.inputs;
  for (const esr::Layer& layer : p.layers) {
    PROMISE(static_cast<int64_t>(layer.op) >= 0 && static_cast<int64_t>(layer.op) < esr::kOpCount);
    PROMISE(static_cast<int64_t>(layer.activation) >= 0 &&
            static_cast<int64_t>(layer.activation) < esr::kActivationCount);
    PROMISE(!layer.inputs.empty());
    for (const int64_t v : layer.inputs) PROMISE(v >= 0 && v < value);
    for (const int64_t w : layer.weights) PROMISE(w >= -1 && w < weights);
    PROMISE(layer.upscale_factor >= 1 && layer.upscale_factor <= 1024);
    PROMISE(layer.shift.size() == layer.scale.size());
    PROMISE(static_cast<int64_t>(layer.statistic) >= 0 && static_cast<int64_t>(layer.statistic) < esr::kStatisticCount);
    PROMISE(layer.correction >= 0 && layer.correction <= 1);
    PROMISE(layer.one_pixel || layer.op != esr::Op::kStatistic);
    PROMISE(!layer.adds_to_every || (layer.op == esr::Op::kAdd && !layer.one_pixel));
    PROMISE(!layer.name().empty());
    ++value;
  }
  for (const int64_t v : p.outputs) PROMISE(v >= 0 && v < value);
}

void fuzz_placement(Bytes in) {
  const int64_t alignment = 1 + in.below(64);
  std::vector<esr::Room> rooms(static_cast<size_t>(in.below(5)));
  for (esr::Room& room : rooms) {
    room.size = int64_t{in.byte()} * (1 + in.below(200));
    room.first = in.below(64);
    room.last = room.first + in.below(64);
  }
  std::vector<esr::Part> parts;
  while (!in.empty() && parts.size() < 64) {
    const int64_t size = in.byte() * (1 + in.below(200)), first = in.below(64);
    parts.push_back({size, first, first + in.below(16)});
  }
  const esr::Placement placement = esr::place_parts(parts, alignment);
  PROMISE(placement.offsets.size() == parts.size());
  int64_t all = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const int64_t begin = placement.offsets[p], end = begin + parts[p].size;
    PROMISE(begin >= 0 && begin % alignment == 0 && end <= placement.size);
    all += esr::round_up(parts[p].size, alignment);
    for (size_t q = 0; q < p; ++q) {
      const bool together = parts[q].first <= parts[p].last && parts[p].first <= parts[q].last;
      const int64_t other = placement.offsets[q];
      PROMISE(!together || parts[p].size == 0 || parts[q].size == 0 || end <= other || other + parts[q].size <= begin);
    }
  }
  PROMISE(placement.size <= all);
  const esr::Spread spread = esr::spread_parts(parts, rooms, alignment);
  PROMISE(spread.rooms.size() == parts.size() && spread.offsets.size() == parts.size());
  PROMISE(spread.size <= all);
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].size == 0) continue;
    const int64_t where = spread.rooms[p], begin = spread.offsets[p], end = begin + parts[p].size;
    PROMISE(where >= -1 && where < static_cast<int64_t>(rooms.size()));
    PROMISE(begin >= 0 && begin % alignment == 0);
    if (where < 0) {
      PROMISE(end <= spread.size);
    } else {
      const esr::Room& room = rooms[static_cast<size_t>(where)];
      PROMISE(end <= room.size && room.first <= parts[p].first && parts[p].last <= room.last);
    }
    for (size_t q = 0; q < p; ++q) {
      const bool together = parts[q].first <= parts[p].last && parts[p].first <= parts[q].last;
      const int64_t other = spread.offsets[q];
      PROMISE(where != spread.rooms[q] || !together || parts[q].size == 0 || end <= other ||
              other + parts[q].size <= begin);
    }
  }
}

// Where pack_dense puts a weight: [block][tap][input][vectors of the block * lanes].
int64_t dense_index(int64_t o, int64_t i, int64_t tap, int64_t cout, int64_t cin, int64_t taps, int64_t lanes) {
  const int64_t vectors = esr::ceil_div(cout, lanes);
  int64_t offset = 0;
  for (int64_t v = 0;;) {
    const int64_t block = esr::next_block(vectors - v);
    if (o < (v + block) * lanes) return offset + (tap * cin + i) * block * lanes + o - v * lanes;
    offset += block * lanes * cin * taps;
    v += block;
  }
}

void fuzz_packing(Bytes in) {
  constexpr int64_t kLanes[] = {4, 8, 16};
  const int64_t lanes = kLanes[in.below(3)], kind = in.below(5);
  const int64_t cout = 1 + in.below(100), cin = kind == 3 ? 1 : 1 + in.below(24);
  const int64_t side = kind == 1 || kind == 4 ? 1 : 3, taps = side * side, rows = 1 + in.below(16);
  esr::Weight w{{cout, cin, side, side}, std::vector<float>(static_cast<size_t>(cout * cin * taps))};
  int64_t number = 0;
  double sum = 0;
  for (float& x : w.values) sum += x = static_cast<float>(1 + (number++ + in.byte()) % 97);
  const auto at = [&](int64_t o, int64_t i, int64_t t) {
    return w.values[static_cast<size_t>((o * cin + i) * taps + t)];
  };
  const int64_t padded = esr::round_up(cout, lanes);
  esr::PackedFloats packed;
  int64_t count = padded * cin * taps;
  if (kind == 0) packed = esr::pack_conv3x3(w, lanes);
  if (kind == 1) packed = esr::pack_conv1x1(w, lanes);
  if (kind == 2) packed = esr::pack_winograd(w, lanes), count = padded * cin * 36;
  if (kind == 3) packed = esr::pack_depthwise(w, lanes);
  if (kind == 4) packed = esr::pack_rows(w, rows), count = esr::round_up(cout, rows) * cin;
  PROMISE(reinterpret_cast<uintptr_t>(packed.data()) % 64 == 0);
  // Every weight is where the kernels read it, and all else is zero.
  double total = 0;
  for (int64_t k = 0; k < count; ++k) total += std::isfinite(packed.data()[k]) ? packed.data()[k] : NAN;
  if (kind == 2) {
    // The transform's first row and column of G have 1/4 and 1: sums over the 36 positions are those of G w G^T.
    PROMISE(std::isfinite(total));
    for (int64_t o = 0; o < cout; ++o) {
      const float corner = packed.data()[dense_index(o, cin - 1, 35, cout, cin, 36, lanes)];
      PROMISE(corner == at(o, cin - 1, 8));
    }
    return;
  }
  PROMISE(total == sum);
  for (int64_t o = 0; o < cout; ++o) {
    for (int64_t i = 0; i < cin; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t k = kind == 3   ? t * padded + o
                          : kind == 4 ? o / rows * rows * cin + i * rows + o % rows
                                      : dense_index(o, i, t, cout, cin, taps, lanes);
        PROMISE(packed.data()[k] == at(o, i, t));
      }
    }
  }
}

// Whether ESR_FUZZ_PLANTED is set; then there is a bug to be found, behind four bytes.
bool planted(const uint8_t* data, size_t size) {
  static const bool wanted = std::getenv("ESR_FUZZ_PLANTED") != nullptr;
  if (!wanted || size < 5) return wanted;
  volatile int depth = 0;
  if (data[1] == 'e') {
    depth = depth + 1;
    if (data[2] == 's') {
      depth = depth + 1;
      if (data[3] == 'r') {
        depth = depth + 1;
        const std::vector<int> values(static_cast<size_t>(depth));
        if (data[4] == '!') std::printf("%d", values.data()[depth]);
      }
    }
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  if (planted(data, size)) return 0;
  const Bytes rest(data + 1, size - 1);
  if (data[0] % 3 == 0) fuzz_program(rest);
  if (data[0] % 3 == 1) fuzz_placement(rest);
  if (data[0] % 3 == 2) fuzz_packing(rest);
  return 0;
}
