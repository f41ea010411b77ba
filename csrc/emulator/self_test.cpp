// Tests of the emulator: `self_test CASE...` runs cases, `--list` names them, `--time` says how long a block takes.
//
// A kernel with a planted bug is a template: kernel<false> is right and must pass, kernel<true> must be found out.

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../cuda/cooperative.h"
#include "../cuda/warpgroup.h"

namespace {

using namespace esr::device;

// ---- cases ------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

#define CASE(name)                                                          \
  void name();                                                              \
  const bool registered_##name = (cases().push_back({#name, &name}), true); \
  void name()

[[noreturn]] void wrong(int line, const std::string& what) {
  throw std::logic_error("line " + std::to_string(line) + ": " + what);
}

#define CHECK(condition) \
  if (!(condition)) wrong(__LINE__, #condition)
#define CHECK_EQUAL(left, right)                                                                                  \
  if (const auto l = left; l != (right)) {                                                                        \
    wrong(__LINE__,                                                                                               \
          std::string(#left " == " #right ", but it is ") + std::to_string(l) + " and " + std::to_string(right)); \
  }

constexpr const char* kOrders[] = {"forward", "reverse", "random:1", "random:2", "random:3"};

// What a kernel works on: `read` may be read, `written` written as well.
struct Args {
  const unsigned char* read;
  unsigned char* written;
};
constexpr int kBytes = 16384;

struct Memory {
  std::vector<unsigned char> read = std::vector<unsigned char>(kBytes + 16);
  std::vector<unsigned char> written = std::vector<unsigned char>(kBytes + 16);
  AllowedMemory allowed;
  Args args{aligned(read), aligned(written)};

  Memory() {
    for (int i = 0; i < kBytes; i++) aligned(read)[i] = static_cast<unsigned char>(i % 251);
    allowed.add(args.read, kBytes, false, "input");
    allowed.add(args.written, kBytes, true, "output");
  }

  template <typename T>
  T result(int i) const {
    T value;
    std::memcpy(&value, args.written + sizeof(T) * static_cast<size_t>(i), sizeof(T));
    return value;
  }
  template <typename T>
  T source(int i) const {
    T value;
    std::memcpy(&value, args.read + sizeof(T) * static_cast<size_t>(i), sizeof(T));
    return value;
  }
  template <typename T>
  void set_source(int i, T value) {
    std::memcpy(const_cast<unsigned char*>(args.read) + sizeof(T) * static_cast<size_t>(i), &value, sizeof(T));
  }

 private:
  static unsigned char* aligned(std::vector<unsigned char>& bytes) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(bytes.data()) + 15) / 16 * 16);
  }
};

using Kernel = void (*)(Args);

constexpr LaunchShape kTwoWarps{2, 1, 64, 8192};
constexpr LaunchShape kOneWarp{1, 1, 32, 8192};

// How a grid is started.
enum class Way { kAlone, kOverlap, kCooperative };

// The error of a launch, or nothing.
std::string error_of(Kernel kernel, const LaunchShape& shape, const Args& args, Way way = Way::kAlone) {
  try {
    if (way == Way::kCooperative) {
      launch_cooperative("the_kernel", kernel, shape, nullptr, args);
    } else {
      launch("the_kernel", kernel, shape, nullptr, way == Way::kOverlap, args);
    }
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// In every order of threads the first kernel passes and the second gives an error that has all these words.
void expect_found(int line, Kernel right, Kernel buggy, std::initializer_list<const char*> words,
                  const LaunchShape& shape = kTwoWarps, Way way = Way::kAlone) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    const auto outcome = [&](Kernel kernel) {
      std::memset(memory.args.written, 0, kBytes);  // flags begin at 0
      return error_of(kernel, shape, memory.args, way);
    };
    const std::string fine = outcome(right);
    if (!fine.empty()) wrong(line, std::string(order) + ", the right kernel: " + fine);
    const std::string found = outcome(buggy);
    if (found.empty()) wrong(line, std::string(order) + ": the bug was not found");
    for (const char* word : words) {
      if (found.find(word) == std::string::npos) wrong(line, std::string(order) + ": no \"" + word + "\" in " + found);
    }
    if (found.find("kernel the_kernel, block (") != 0) wrong(line, "no place in " + found);
    // What failed leaves nothing behind.
    const std::string again = outcome(right);
    if (!again.empty()) wrong(line, std::string(order) + ", the right kernel after the wrong one: " + again);
  }
}
#define FOUND(kernel, ...) expect_found(__LINE__, kernel<false>, kernel<true>, __VA_ARGS__)

void expect_fine(int line, Kernel kernel, const LaunchShape& shape, const Memory& memory) {
  const std::string error = error_of(kernel, shape, memory.args);
  if (!error.empty()) wrong(line, error);
}
#define FINE(kernel, shape, memory) expect_fine(__LINE__, kernel, shape, memory)

// ---- where a thread is ------------------------------------------------------------------------------------------

ESR_KERNEL(64, 1) positions(ESR_ARGUMENT(Args) args) {
  const int64_t block = block_row() * grid_size() + block_index();
  const int64_t thread = block * thread_count() + thread_index();
  store_global<int>(args.written + 4 * thread, static_cast<int>(thread) + 1);
}

CASE(positions_cover_the_grid) {
  Memory memory;
  FINE(positions, (LaunchShape{5, 3, 64, 0}), memory);
  for (int i = 0; i < 5 * 3 * 64; i++) CHECK_EQUAL(memory.result<int>(i), i + 1);
  CHECK_EQUAL(memory.result<int>(5 * 3 * 64), 0);
}

std::vector<int> turns;

ESR_KERNEL(64, 1) record_turns(ESR_ARGUMENT(Args)) {
  turns.push_back(static_cast<int>(block_index()) * 1000 + thread_index());
  sync_block();
  turns.push_back(static_cast<int>(block_index()) * 1000 + thread_index());
}

CASE(orders_of_threads) {
  Memory memory;
  const auto turns_of = [&](const char* order) {
    set_order(order);
    turns.clear();
    FINE(record_turns, (LaunchShape{2, 1, 64, 0}), memory);
    return turns;
  };
  const std::vector<int> forward = turns_of("forward"), random = turns_of("random:7");
  std::vector<int> reverse = turns_of("reverse");
  for (int i = 0; i < 256; i++) CHECK_EQUAL(forward[static_cast<size_t>(i)], i / 128 * 1000 + i % 64);
  for (int i = 0; i < 256; i++) CHECK_EQUAL(reverse[static_cast<size_t>(i)], (1 - i / 128) * 1000 + 63 - i % 64);
  CHECK(random != forward && random != reverse);
  CHECK(random == turns_of("random:7"));
  CHECK(random != turns_of("random:8"));
  set_order("");
  setenv("ESR_EMULATOR_ORDER", "reverse", 1);
  turns.clear();
  FINE(record_turns, (LaunchShape{2, 1, 64, 0}), memory);
  CHECK(turns == reverse);
  setenv("ESR_EMULATOR_ORDER", "backward", 1);
  CHECK(error_of(record_turns, kOneWarp, memory.args).find("not backward") != std::string::npos);
  unsetenv("ESR_EMULATOR_ORDER");
}

// ---- numbers ----------------------------------------------------------------------------------------------------

// The value of 16 bits with this many of significand, from the definition.
double value_of(uint32_t bits, int significand) {
  const uint32_t exponent = (bits & 0x7fff) >> significand;
  const double fraction = std::ldexp(bits & ((1u << significand) - 1), -significand);
  const int bias = (1 << (14 - significand)) - 1;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, static_cast<int>(exponent) - bias);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <typename T>
void check_conversions(int significand) {
  const uint32_t infinity = ((1u << (15 - significand)) - 1) << significand;
  for (uint32_t bits = 0; bits < infinity; bits++) {
    for (const uint32_t sign : {0u, 0x8000u}) {
      const T lower{static_cast<uint16_t>(bits | sign)};
      const float x = to_float(lower);
      CHECK(static_cast<double>(x) == value_of(bits | sign, significand) && std::signbit(x) == (sign != 0));
      CHECK_EQUAL(from_float<T>(x).bits, lower.bits);
      if (bits + 1 == infinity) continue;
      // Half-way to the next: the even one; on either side: the nearer.
      const uint16_t upper = static_cast<uint16_t>(lower.bits + 1);
      const double next = value_of(upper, significand);
      const float middle = static_cast<float>((static_cast<double>(x) + next) / 2);
      CHECK_EQUAL(from_float<T>(middle).bits, bits % 2 == 0 ? lower.bits : upper);
      CHECK_EQUAL(from_float<T>(std::nextafter(middle, x)).bits, lower.bits);
      CHECK_EQUAL(from_float<T>(std::nextafter(middle, static_cast<float>(next))).bits, upper);
    }
  }
  CHECK_EQUAL(from_float<T>(INFINITY).bits, infinity);
  CHECK_EQUAL(from_float<T>(-INFINITY).bits, infinity | 0x8000u);
  CHECK_EQUAL(from_float<T>(std::numeric_limits<float>::max()).bits, infinity);
  CHECK(std::isnan(to_float(from_float<T>(NAN))));
  CHECK(to_float(T{static_cast<uint16_t>(infinity)}) == INFINITY);
  const uint32_t pair = pack_pair<T>(1.5f, -2.0f);
  CHECK(to_float(T{static_cast<uint16_t>(pair)}) == 1.5f && to_float(T{static_cast<uint16_t>(pair >> 16)}) == -2.0f);
}

CASE(float16_conversions) { check_conversions<float16>(10); }
CASE(bfloat16_conversions) { check_conversions<bfloat16>(7); }

CASE(tf32_rounding) {
  for (const float sign : {1.0f, -1.0f}) {
    const float step = std::ldexp(1.0f, -10);
    for (int i = 0; i < 1024; i++) {
      const float lower = 1 + static_cast<float>(i) * step, upper = lower + step, middle = lower + step / 2;
      CHECK(bits_float(round_tf32(sign * lower)) == sign * lower);
      CHECK(bits_float(round_tf32(sign * middle)) == sign * upper);
      CHECK(bits_float(round_tf32(sign * std::nextafter(middle, 0.0f))) == sign * lower);
    }
  }
  CHECK(bits_float(round_tf32(INFINITY)) == INFINITY);
  CHECK(std::isnan(bits_float(round_tf32(NAN))));
  CHECK(float_bits(1.0f) == 0x3f800000u && bits_float(0x3f800000u) == 1.0f);
  CHECK(to_float(2.5f) == 2.5f && from_float<float>(2.5f) == 2.5f);
}

CASE(fast_functions) {
  for (float x = -80; x < 80; x += 0.37f) {
    const double exact = std::exp(static_cast<double>(x));
    CHECK(std::fabs(fast_exp(x) - exact) <= exact * 1.2e-7 * (2 + std::fabs(1.173 * static_cast<double>(x))));
  }
  CHECK(fast_exp(100) == INFINITY && fast_exp(-200) == 0);
  CHECK(fast_divide(1, 3) == 1.0f / 3);
  CHECK(fast_divide(5, 0x1p127f) == 0 && fast_divide(5, INFINITY) == 0);
  CHECK(std::isnan(fast_divide(INFINITY, 0x1p127f)));
}

ESR_KERNEL(64, 1) shuffles(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  int i = 0;
  for (const int mask : {0, 1, 2, 5, 16, 31}) {
    const float v = shuffle_xor(static_cast<float>(100 * i + t), mask);
    store_global<float>(args.written + 4 * (64 * i++ + t), v);
  }
}

CASE(shuffle) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    FINE(shuffles, (LaunchShape{1, 1, 64, 0}), memory);
    int i = 0;
    for (const int mask : {0, 1, 2, 5, 16, 31}) {
      for (int t = 0; t < 64; t++) {
        CHECK_EQUAL(memory.result<float>(64 * i + t), static_cast<float>(100 * i + (t ^ mask)));
      }
      i++;
    }
  }
}

// ---- tensor cores, against the formulas of the PTX ISA ----------------------------------------------------------

// The operands' fragments of a lane lie one after another in `read`: 4 words of a, 2 of b, 4 of d.
template <typename T>
ESR_KERNEL(32, 1)
multiply_once(ESR_ARGUMENT(Args) args) {
  const unsigned char* mine = args.read + 40 * thread_index();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = load_global<uint32_t>(mine + 4 * i);
  for (int i = 0; i < 2; i++) b[i] = load_global<uint32_t>(mine + 16 + 4 * i);
  for (int i = 0; i < 4; i++) d[i] = load_global<float>(mine + 24 + 4 * i);
  multiply_add<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) store_global<float>(args.written + 4 * (4 * thread_index() + i), d[i]);
}

// Small whole numbers, all different, so that every type holds them and every sum is exact.
float a_at(int row, int column, int columns) { return static_cast<float>(row * columns + column); }
float b_at(int row, int column) { return static_cast<float>(1 + row * 8 + column); }
float d_at(int row, int column) { return static_cast<float>(100000 + row * 8 + column); }

template <typename T>
void check_product(int depth) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    for (int lane = 0; lane < 32; lane++) {
      // "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8", with the names used there.
      const int group = lane >> 2, in_group = lane % 4;
      unsigned char fragment[40];
      if constexpr (std::is_same_v<T, tf32>) {
        for (int i = 0; i < 4; i++) {
          const int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
          const float v = a_at(row, column, depth);
          std::memcpy(fragment + 4 * i, &v, 4);
        }
        for (int i = 0; i < 2; i++) {
          const float v = b_at(i == 0 ? in_group : in_group + 4, group);
          std::memcpy(fragment + 16 + 4 * i, &v, 4);
        }
      } else {
        for (int i = 0; i < 8; i++) {
          const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
          const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
          const T v = from_float<T>(a_at(row, column, depth));
          std::memcpy(fragment + 2 * i, &v, 2);
        }
        for (int i = 0; i < 4; i++) {
          const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
          const T v = from_float<T>(b_at(row, group));
          std::memcpy(fragment + 16 + 2 * i, &v, 2);
        }
      }
      for (int i = 0; i < 4; i++) {
        const float v = d_at(i < 2 ? group : group + 8, in_group * 2 + (i & 1));
        std::memcpy(fragment + 24 + 4 * i, &v, 4);
      }
      for (int i = 0; i < 40; i++) memory.set_source<unsigned char>(40 * lane + i, fragment[i]);
    }
    FINE(multiply_once<T>, kOneWarp, memory);
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 4; i++) {
        const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = (lane % 4) * 2 + (i & 1);
        float sum = d_at(row, column);
        for (int k = 0; k < depth; k++) sum += a_at(row, k, depth) * b_at(k, column);
        CHECK_EQUAL(memory.result<float>(4 * lane + i), sum);
      }
    }
  }
}

CASE(multiply_float16) { check_product<float16>(16); }
CASE(multiply_bfloat16) { check_product<bfloat16>(16); }
CASE(multiply_tf32) { check_product<tf32>(8); }

CASE(multiply_tf32_truncates) {
  Memory memory;
  const float beyond = bits_float(0x3f801fffu);  // 1 and the 13 bits that a tf32 has not
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 6; i++) memory.set_source<float>(10 * lane + i, beyond);
    for (int i = 6; i < 10; i++) memory.set_source<float>(10 * lane + i, 0);
  }
  FINE(multiply_once<tf32>, kOneWarp, memory);
  CHECK_EQUAL(memory.result<float>(0), 8.0f);
}

// Row j of matrix i lies at 16 * place(i, j) and holds bytes that tell the matrix, the row and the byte.
int place(int matrix, int row) { return (matrix * 37 + row * 5) % 128; }

template <bool Transposed>
ESR_KERNEL(32, 1)
load_once(ESR_ARGUMENT(Args) args) {
  const int lane = thread_index();
  unsigned char* shared = shared_memory();
  unsigned char* row = shared + 16 * place(lane / 8, lane % 8);
  for (int i = 0; i < 16; i++)
    store_shared<unsigned char>(row + i, load_global<unsigned char>(args.read + 16 * lane + i));
  sync_warp();
  uint32_t r[4];
  if constexpr (Transposed) {
    load_matrices_transposed(r, row);
  } else {
    load_matrices(r, row);
  }
  for (int i = 0; i < 4; i++) store_global<uint32_t>(args.written + 4 * (4 * lane + i), r[i]);
}

template <bool Transposed>
void check_matrices() {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    // 16-bit elements, all different.
    const auto element = [](int matrix, int row, int column) {
      return static_cast<uint16_t>(0x1000 + matrix * 64 + row * 8 + column);
    };
    for (int i = 0; i < 256; i++) memory.set_source<uint16_t>(i, element(i / 64, i / 8 % 8, i % 8));
    FINE(load_once<Transposed>, kOneWarp, memory);
    for (int lane = 0; lane < 32; lane++) {
      for (int matrix = 0; matrix < 4; matrix++) {
        const uint32_t r = memory.result<uint32_t>(4 * lane + matrix);
        const int row = lane / 4, column = lane % 4 * 2;
        const uint16_t low = Transposed ? element(matrix, column, row) : element(matrix, row, column);
        const uint16_t high = Transposed ? element(matrix, column + 1, row) : element(matrix, row, column + 1);
        CHECK_EQUAL(r, low | static_cast<uint32_t>(high) << 16);
      }
    }
  }
}

CASE(matrices) { check_matrices<false>(); }
CASE(matrices_transposed) { check_matrices<true>(); }

// a [16, 16] in rows, b [16, 8] in rows (its fragments need the transposition), through shared memory.
ESR_KERNEL(32, 1) product_through_shared(ESR_ARGUMENT(Args) args) {
  const int lane = thread_index();
  unsigned char* a = shared_memory();
  unsigned char* b = a + 512;
  copy_async<16>(a + 16 * lane, args.read + 16 * lane, true);
  copy_async<16>(b + 16 * lane, args.read + 512 + 16 * lane, lane < 16);
  commit_copies();
  wait_for_copies<0>();
  sync_warp();
  uint32_t fa[4], fb[4];
  load_matrices(fa, a + 32 * (lane % 16) + 16 * (lane / 16));
  load_matrices_transposed(fb, b + 16 * lane);
  float d[4] = {};
  multiply_add<float16>(d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    store_global<float>(args.written + 4 * (8 * row + column), d[i]);
  }
  multiply_add<float16>(d, fa, fb[2], fb[3]);  // the zeros
  for (int i = 0; i < 4; i++) store_global<float>(args.written + 512 + 4 * (4 * lane + i), d[i]);
}

CASE(product_of_matrices_in_shared_memory) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    for (int i = 0; i < 256; i++) memory.set_source(i, from_float<float16>(a_at(i / 16, i % 16, 16)));
    for (int i = 0; i < 128; i++) memory.set_source(256 + i, from_float<float16>(b_at(i / 8, i % 8)));
    FINE(product_through_shared, kOneWarp, memory);
    for (int row = 0; row < 16; row++) {
      for (int column = 0; column < 8; column++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += a_at(row, k, 16) * b_at(k, column);
        CHECK_EQUAL(memory.result<float>(8 * row + column), sum);
        const int lane = row % 8 * 4 + column / 2, i = row / 8 * 2 + column % 2;
        CHECK_EQUAL(memory.result<float>(128 + 4 * lane + i), sum);
      }
    }
  }
}

// ---- asynchronous copies ----------------------------------------------------------------------------------------

template <int Bytes>
ESR_KERNEL(64, 1)
copy_every_third_not(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  unsigned char* target = shared_memory() + Bytes * t;
  const bool valid = t % 3 != 0;
  copy_async<Bytes>(target, valid ? args.read + Bytes * t : nullptr, valid);
  commit_copies();
  wait_for_copies<0>();
  for (int i = 0; i < Bytes; i++) {
    store_global<unsigned char>(args.written + Bytes * t + i, load_shared<unsigned char>(target + i));
  }
}

template <int Bytes>
void check_copies() {
  Memory memory;
  FINE(copy_every_third_not<Bytes>, kTwoWarps, memory);
  for (int i = 0; i < 64 * Bytes; i++) {
    const int expected = i / Bytes % 3 == 0 ? 0 : memory.source<unsigned char>(i);
    CHECK_EQUAL(static_cast<int>(memory.result<unsigned char>(i)), expected);
  }
}

CASE(copies_and_zero_fill) {
  check_copies<4>();
  check_copies<8>();
  check_copies<16>();
}

// A ring of three places, two groups under way.
ESR_KERNEL(32, 1) copy_pipeline(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  const auto place = [&](int step) { return shared_memory() + 4 * (step % 3 * 32 + t); };
  const auto start = [&](int step) {
    if (step < 20) copy_async<4>(place(step), args.read + 4 * (32 * step + t), true);
    commit_copies();  // an empty group counts
  };
  start(0);
  start(1);
  for (int step = 0; step < 20; step++) {
    start(step + 2);
    wait_for_copies<2>();
    store_global<uint32_t>(args.written + 4 * (32 * step + t), load_shared<uint32_t>(place(step)));
  }
}

CASE(copy_groups) {
  Memory memory;
  FINE(copy_pipeline, kOneWarp, memory);
  for (int i = 0; i < 20 * 32; i++) CHECK_EQUAL(memory.result<uint32_t>(i), memory.source<uint32_t>(i));
}

template <bool Bug>
ESR_KERNEL(64, 1)
one_group_too_many(ESR_ARGUMENT(Args) args) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  for (int i = 0; i < 3; i++) {
    copy_async<4>(mine + 4 * i, args.read + 4 * i, true);
    commit_copies();
  }
  wait_for_copies<Bug ? 2 : 1>();
  load_shared<uint32_t>(mine + 4);
  wait_for_copies<0>();
}
CASE(bug_waits_for_too_few_groups) { FOUND(one_group_too_many, {"copy in flight: reads", "not yet waited for"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
uncommitted(ESR_ARGUMENT(Args) args) {
  unsigned char* mine = shared_memory() + 4 * thread_index();
  copy_async<4>(mine, args.read, true);
  if (!Bug) commit_copies();
  wait_for_copies<0>();
  load_shared<uint32_t>(mine);
}
CASE(bug_waits_for_uncommitted_copies) { FOUND(uncommitted, {"copy in flight: reads"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
missing_wait(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  copy_async<16>(shared_memory() + 16 * t, args.read + 16 * t, true);
  commit_copies();
  if (!Bug) wait_for_copies<0>();
  sync_block();
  load_shared<uint32_t>(shared_memory() + 16 * (63 - t));
  wait_for_copies<0>();
}
CASE(bug_missing_wait) { FOUND(missing_wait, {"copy in flight: reads", "self_test.cpp:"}); }

// A wait without a barrier shows a thread its own copies only.
template <bool Bug>
ESR_KERNEL(64, 1)
missing_barrier_after_wait(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  store_shared<uint32_t>(shared_memory() + 4 * t, 0);
  sync_block();
  copy_async<4>(shared_memory() + 4 * t, args.read + 4 * t, true);
  commit_copies();
  wait_for_copies<0>();
  if (!Bug) sync_block();
  load_shared<uint32_t>(shared_memory() + 4 * (t ^ 33));
}
CASE(bug_missing_barrier_after_wait) { FOUND(missing_barrier_after_wait, {"race: ", "barrier between"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
copies_to_one_place(ESR_ARGUMENT(Args) args) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  copy_async<16>(mine, args.read, true);
  copy_async<4>(mine + (Bug ? 12 : 1024), args.read, true);
  commit_copies();
  wait_for_copies<0>();
}
CASE(bug_two_copies_to_one_place) { FOUND(copies_to_one_place, {"copy in flight: copies to shared memory at offset"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
store_into_copy(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  copy_async<4>(shared_memory() + 4 * t, args.read, true);
  commit_copies();
  if (!Bug) wait_for_copies<0>();
  sync_block();
  store_shared<uint32_t>(shared_memory() + 4 * (t ^ 32), 1);
  wait_for_copies<0>();
}
CASE(bug_store_into_a_copy_in_flight) { FOUND(store_into_copy, {"copy in flight: writes"}); }

// The next tile's copy starts while others still read this one.
template <bool Bug>
ESR_KERNEL(64, 1)
copy_over_what_is_read(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  unsigned char* shared = shared_memory();
  for (int step = 0; step < 3; step++) {
    copy_async<16>(shared + 16 * t, args.read + 16 * (t + step), true);
    commit_copies();
    wait_for_copies<0>();
    sync_block();
    uint32_t r[4];
    load_matrices(r, shared + 16 * (63 - t));
    if (!Bug) sync_block();
  }
}
CASE(bug_copy_over_what_is_read) { FOUND(copy_over_what_is_read, {"race: ", "with no barrier between"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
ends_with_copies(ESR_ARGUMENT(Args) args) {
  copy_async<8>(shared_memory() + 8 * thread_index(), args.read, thread_index() != 5);
  commit_copies();
  if (!Bug || thread_index() != 40) wait_for_copies<0>();
}
CASE(bug_ends_with_copies_in_flight) {
  FOUND(ends_with_copies, {"thread 40 at self_test.cpp:", "ends with copies in flight: 1 issued"});
}

// ---- races ------------------------------------------------------------------------------------------------------

template <bool Bug>
ESR_KERNEL(64, 1)
missing_sync_block(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  store_shared<uint32_t>(shared_memory() + 4 * t, 0);
  sync_block();
  store_shared<uint32_t>(shared_memory() + 4 * t, 1);
  if (Bug) {
    sync_warp();
  } else {
    sync_block();
  }
  load_shared<uint32_t>(shared_memory() + 4 * (63 - t));
}
CASE(bug_missing_sync_block) { FOUND(missing_sync_block, {"race: ", "with no barrier between"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
missing_sync_block_before_write(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  for (int step = 0; step < 2; step++) {
    store_shared<uint32_t>(shared_memory() + 4 * t, 0);
    sync_block();
    load_shared<uint32_t>(shared_memory() + 4 * (63 - t));
    if (!Bug) sync_block();
  }
}
CASE(bug_write_over_what_is_read) { FOUND(missing_sync_block_before_write, {"race: ", "with no barrier between"}); }

// Thread 0 reads what thread 32 writes: whichever comes first, the second is an error.
template <bool Bug>
ESR_KERNEL(64, 1)
read_and_write(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  if (t == 8) store_shared<uint32_t>(shared_memory(), 0);
  sync_block();
  if (t == 0) load_shared<uint32_t>(shared_memory());
  if (!Bug) sync_block();
  if (t == 32) store_shared<uint32_t>(shared_memory(), 1);
}
CASE(race_from_either_side) {
  FOUND(read_and_write, {"race: ", "shared memory at offset 0, which thread "});
  Memory memory;
  set_order("forward");
  std::string error = error_of(read_and_write<true>, kTwoWarps, memory.args);
  CHECK(error.find("thread 32 at") != std::string::npos && error.find("which thread 0 read (") != std::string::npos);
  set_order("reverse");
  error = error_of(read_and_write<true>, kTwoWarps, memory.args);
  CHECK(error.find("thread 0 at") != std::string::npos && error.find("which thread 32 wrote (") != std::string::npos);
}

// All read, then the last reader writes: the others before it count.
template <bool Bug>
ESR_KERNEL(64, 1)
several_readers(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  if (t == 0) store_shared<uint32_t>(shared_memory(), 0);
  sync_block();
  if (t % 32 == 0 || t % 32 == 31) load_shared<uint32_t>(shared_memory());
  if (!Bug) sync_block();
  if (t == 63) store_shared<uint32_t>(shared_memory(), 1);
}
CASE(bug_several_readers) {
  FOUND(several_readers, {"race: "});
  Memory memory;
  set_order("forward");
  const std::string error = error_of(several_readers<true>, kTwoWarps, memory.args);
  CHECK(error.find("thread 63 at") != std::string::npos &&
        error.find("among others of several warps read (") != std::string::npos);
}

template <bool Bug>
ESR_KERNEL(32, 1)
several_lanes(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  if (t == 0) store_shared<uint32_t>(shared_memory(), 0);
  sync_warp();
  load_shared<uint32_t>(shared_memory());
  if (!Bug) sync_warp();
  if (t == 31) store_shared<uint32_t>(shared_memory(), 1);
}
CASE(bug_several_readers_of_a_warp) {
  FOUND(several_lanes, {"race: "}, kOneWarp);
  Memory memory;
  set_order("forward");
  const std::string error = error_of(several_lanes<true>, kOneWarp, memory.args);
  CHECK(error.find("thread 31 at") != std::string::npos &&
        error.find("among others of its warp read (") != std::string::npos);
}

// What another warp read between is not forgotten when the first warp reads again.
template <bool Bug>
ESR_KERNEL(64, 1)
reads_in_turns(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  if (t == 0) store_shared<uint32_t>(shared_memory(), 0);
  sync_block();
  for (int i = 0; i < 8; i++) {
    if (t == 0 || (t == 32 && i == 4)) load_shared<uint32_t>(shared_memory());
    sync_warp();
  }
  if (!Bug) sync_block();
  if (t == 0) store_shared<uint32_t>(shared_memory(), 1);
}
CASE(bug_several_readers_in_turns) { FOUND(reads_in_turns, {"race: "}); }

template <bool Bug>
ESR_KERNEL(64, 1)
two_writers(ESR_ARGUMENT(Args)) {
  if (thread_index() == 3) store_shared<uint32_t>(shared_memory() + 8, 0);
  if (!Bug) sync_block();
  if (thread_index() == 60) store_shared<uint16_t>(shared_memory() + 10, 0);
}
CASE(bug_two_writers) { FOUND(two_writers, {"race: writes", "wrote (self_test.cpp:"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
missing_sync_warp(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  store_shared<uint32_t>(shared_memory() + 4 * t, 0);
  sync_warp();
  store_shared<uint32_t>(shared_memory() + 4 * t, 1);
  if (!Bug) sync_warp();
  load_shared<uint32_t>(shared_memory() + 4 * (t ^ 1));
}
CASE(bug_missing_sync_warp) { FOUND(missing_sync_warp, {"race: ", "with no sync_warp or sync_block between"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
missing_sync_warp_before_write(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  store_shared<uint32_t>(shared_memory() + 4 * t, 0);
  sync_warp();
  load_shared<uint32_t>(shared_memory() + 4 * (t ^ 1));
  if (!Bug) sync_warp();
  store_shared<uint32_t>(shared_memory() + 4 * t, 1);
}
CASE(bug_missing_sync_warp_before_write) { FOUND(missing_sync_warp_before_write, {"race: ", "sync_warp"}); }

// The warp as a whole reads matrices; meeting there orders nothing.
template <bool Bug>
ESR_KERNEL(64, 1)
matrices_without_sync_warp(ESR_ARGUMENT(Args)) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  store_shared<U32x4>(mine, {});
  if (!Bug) sync_warp();
  uint32_t r[4];
  load_matrices(r, mine);
}
CASE(bug_matrices_of_unsynchronised_stores) { FOUND(matrices_without_sync_warp, {"race: reads", "wrote"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
write_over_matrices(ESR_ARGUMENT(Args)) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  store_shared<U32x4>(mine, {});
  sync_warp();
  uint32_t r[4];
  load_matrices_transposed(r, mine);
  float d[4] = {};
  multiply_add<float16>(d, r, r[0], r[1]);
  shuffle_xor(d[0], 1);
  if (!Bug) sync_warp();
  store_shared<U32x4>(mine, {});
}
CASE(bug_write_over_matrices_being_read) { FOUND(write_over_matrices, {"race: writes", "among others of its warp"}); }

// A barrier of another warp orders nothing.
template <bool Bug>
ESR_KERNEL(96, 1)
barrier_of_another_warp(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  if (t == 0) store_shared<uint32_t>(shared_memory(), 1);
  if (!Bug) sync_block();
  for (int i = 0; i < 3; i++) sync_warp();
  if (t == 64) store_shared<uint32_t>(shared_memory(), 2);
}
CASE(bug_barriers_of_other_warps) { FOUND(barrier_of_another_warp, {"race: writes"}, LaunchShape{1, 1, 96, 64}); }

// Neighbouring bytes are not the same bytes.
ESR_KERNEL(64, 1) neighbours(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  store_shared<unsigned char>(shared_memory() + t, static_cast<unsigned char>(t));
  store_shared<float16>(shared_memory() + 64 + 2 * t, float16{});
  store_shared<U32x2>(shared_memory() + 192 + 8 * t, U32x2{});
  load_shared<unsigned char>(shared_memory() + t);
  sync_block();
  load_shared<U32x4>(shared_memory() + 16 * (t % 44));
}
CASE(neighbouring_bytes_are_no_race) {
  for (const char* order : kOrders) {
    set_order(order);
    FINE(neighbours, kTwoWarps, Memory());
  }
}

// ---- what may be touched ----------------------------------------------------------------------------------------

template <bool Bug>
ESR_KERNEL(64, 1)
uninitialised(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  if (!Bug || (block_index() == 0 && t != 1)) store_shared<uint32_t>(shared_memory() + 4 * t, 0);
  load_shared<uint32_t>(shared_memory() + 4 * t);
}
CASE(bug_uninitialised_shared) {
  FOUND(uninitialised, {"uninitialised: reads shared memory at offset", "nobody has written in this block"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
uninitialised_padding(ESR_ARGUMENT(Args)) {
  unsigned char* mine = shared_memory() + 16 * thread_index();
  for (int i = 0; i < 7 + !Bug; i++) store_shared<uint16_t>(mine + 2 * i, 0);
  sync_warp();
  uint32_t r[4];
  load_matrices(r, mine);
}
CASE(bug_uninitialised_end_of_a_row) { FOUND(uninitialised_padding, {"uninitialised: reads shared memory at offset"}); }

ESR_KERNEL(64, 1) garbage(ESR_ARGUMENT(Args) args) {
  // Past the emulator's back, which kernels cannot do.
  store_global<unsigned char>(args.written + thread_index(), shared_memory()[thread_index()]);
  if (block_index() == 0) shared_memory()[thread_index()] = 0;
}
CASE(shared_memory_starts_as_nan) {
  Memory memory;
  FINE(garbage, kTwoWarps, memory);
  CHECK_EQUAL(static_cast<int>(memory.result<unsigned char>(3)), 0xff);
  CHECK_EQUAL(reinterpret_cast<uintptr_t>(emulator::Machine::mine().shared) % 128, 0u);
}

template <bool Bug>
ESR_KERNEL(64, 1)
shared_write_beyond(ESR_ARGUMENT(Args)) {
  store_shared<U32x2>(shared_memory() + 8 * (thread_index() + Bug), U32x2{});
}
CASE(bug_out_of_range_shared_write) {
  FOUND(shared_write_beyond,
        {"thread 63 at self_test.cpp:", "out of range: writes 8 bytes of shared memory at offset 512 of 512"},
        LaunchShape{1, 1, 64, 512});
}

template <bool Bug>
ESR_KERNEL(64, 1)
shared_read_before(ESR_ARGUMENT(Args)) {
  store_shared<uint32_t>(shared_memory() + 4 * thread_index(), 1);
  load_shared<uint32_t>(shared_memory() + 4 * (Bug && thread_index() == 0 ? -1 : thread_index()));
}
CASE(bug_out_of_range_shared_read) {
  FOUND(shared_read_before, {"thread 0 at", "out of range: reads 4 bytes of shared memory at offset -4 of 8192"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
matrices_beyond(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  store_shared<U32x4>(shared_memory() + 16 * t, U32x4{});
  sync_block();
  uint32_t r[4];
  load_matrices(r, shared_memory() + 16 * (Bug && t == 17 ? 64 : t));
}
CASE(bug_out_of_range_matrices) {
  FOUND(matrices_beyond, {"thread 17 at", "out of range: reads 16 bytes of shared memory at offset 1024 of 1024"},
        LaunchShape{1, 1, 64, 1024});
}

template <bool Bug>
ESR_KERNEL(64, 1)
copy_beyond(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  copy_async<4>(shared_memory() + 4 * (t + (Bug && t == 63)), args.read, false);
  commit_copies();
  wait_for_copies<0>();
}
CASE(bug_out_of_range_copy_target) {
  FOUND(copy_beyond, {"thread 63 at", "out of range: copies to 4 bytes of shared memory at offset 256 of 256"},
        LaunchShape{1, 1, 64, 256});
}

template <bool Bug>
ESR_KERNEL(64, 1)
global_as_shared(ESR_ARGUMENT(Args) args) {
  store_shared<uint32_t>(shared_memory() + 4 * thread_index(), 1);
  load_shared<uint32_t>(Bug ? args.read : shared_memory() + 4 * thread_index());
}
CASE(bug_global_address_as_shared) {
  FOUND(global_as_shared, {"shared memory at 0x", "which is byte 0 of \"input\" in global memory"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
shared_as_global(ESR_ARGUMENT(Args) args) {
  load_global<uint32_t>(Bug ? shared_memory() + 8 : args.read);
}
CASE(bug_shared_address_as_global) { FOUND(shared_as_global, {"global memory at 0x", "byte 8 of shared memory"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
global_read_beyond(ESR_ARGUMENT(Args) args) {
  load_global<U32x4>(args.read + kBytes - 16 * (thread_index() + 1 - Bug));
}
CASE(bug_out_of_range_global_read) {
  FOUND(global_read_beyond, {"thread 0 at", "out of range: reads 16 bytes of global memory at"}, kTwoWarps);
}

template <bool Bug>
ESR_KERNEL(64, 1)
global_write_before(ESR_ARGUMENT(Args) args) {
  store_global<uint32_t>(args.written + 4 * (thread_index() - Bug), 1);
}
CASE(bug_out_of_range_global_write) {
  FOUND(global_write_before, {"thread 0 at", "out of range: writes 4 bytes of global memory at"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
copy_source_beyond(ESR_ARGUMENT(Args) args) {
  const bool valid = Bug || thread_index() != 9;
  copy_async<8>(shared_memory() + 8 * thread_index(), args.read + (thread_index() == 9 ? 1 << 20 : 0), valid);
  commit_copies();
  wait_for_copies<0>();
}
CASE(bug_out_of_range_copy_source) {
  FOUND(copy_source_beyond, {"thread 9 at", "out of range: reads 8 bytes of global memory at"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
write_to_read_only(ESR_ARGUMENT(Args) args) {
  store_global<uint32_t>((Bug ? const_cast<unsigned char*>(args.read) : args.written) + 4 * thread_index(), 1);
}
CASE(bug_write_to_read_only) { FOUND(write_to_read_only, {"read-only: writes 4 bytes", "of \"input\""}); }

ESR_KERNEL(32, 1) read_one(ESR_ARGUMENT(Args) args) { load_global<uint32_t>(args.read); }

CASE(allowed_memory_lives_as_long_as_its_object) {
  Memory memory;
  alignas(16) unsigned char bytes[8] = {};
  const Args args{bytes, bytes};
  {
    AllowedMemory allowed;
    allowed.add(nullptr, 0, false, "nothing");
    allowed.add(bytes, 0, true, "empty");
    CHECK(error_of(read_one, kOneWarp, args).find("byte 0 of \"empty\" of 0 bytes") != std::string::npos);
    allowed.add(bytes, 3, true, "short");
    CHECK(error_of(read_one, kOneWarp, args).find("out of range") != std::string::npos);
    allowed.add(bytes, 4, false, "whole");
    CHECK(error_of(read_one, kOneWarp, args).empty());
  }
  CHECK(error_of(read_one, kOneWarp, args).find("out of range") != std::string::npos);
  CHECK(error_of(read_one, kOneWarp, memory.args).empty());
}

template <bool Bug>
ESR_KERNEL(64, 1)
misaligned_shared(ESR_ARGUMENT(Args)) {
  store_shared<uint32_t>(shared_memory() + 4 * thread_index(), 1);
  sync_block();
  if (thread_index() == 7) load_shared<U32x2>(shared_memory() + 8 + 4 * Bug);
}
CASE(bug_misaligned_shared) {
  FOUND(misaligned_shared, {"thread 7 at", "misaligned: reads 8 bytes of shared memory at offset 12"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
misaligned_matrices(ESR_ARGUMENT(Args)) {
  for (int i = 0; i < 8; i++) store_shared<uint32_t>(shared_memory() + 4 * (8 * thread_index() + i), 1);
  sync_warp();
  uint32_t r[4];
  load_matrices_transposed(r, shared_memory() + 32 * thread_index() + 8 * Bug);
}
CASE(bug_misaligned_matrices) { FOUND(misaligned_matrices, {"misaligned: reads 16 bytes of shared memory at"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
misaligned_copy_target(ESR_ARGUMENT(Args) args) {
  copy_async<16>(shared_memory() + 32 * thread_index() + 8 * Bug, args.read, true);
  commit_copies();
  wait_for_copies<0>();
}
CASE(bug_misaligned_copy_target) { FOUND(misaligned_copy_target, {"misaligned: copies to 16 bytes of shared memory"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
misaligned_copy_source(ESR_ARGUMENT(Args) args) {
  copy_async<16>(shared_memory() + 16 * thread_index(), args.read + 4 * Bug, true);
  commit_copies();
  wait_for_copies<0>();
}
CASE(bug_misaligned_copy_source) { FOUND(misaligned_copy_source, {"misaligned: reads 16 bytes of global memory"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
misaligned_global(ESR_ARGUMENT(Args) args) {
  store_global<U32x2>(args.written + 8 * thread_index() + 2 * Bug, U32x2{});
}
CASE(bug_misaligned_global) { FOUND(misaligned_global, {"misaligned: writes 8 bytes of global memory at"}); }

// ---- divergence -------------------------------------------------------------------------------------------------

template <bool Bug>
ESR_KERNEL(64, 1)
warp_skips_barrier(ESR_ARGUMENT(Args)) {
  if (!Bug || thread_index() < 32) sync_block();
}
CASE(bug_warp_skips_sync_block) {
  FOUND(warp_skips_barrier, {"divergent barrier: 32 threads (the first: 0) wait at sync_block (self_test.cpp:",
                             "32 threads (the first: 32) have ended"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
lane_leaves_early(ESR_ARGUMENT(Args)) {
  if (Bug && thread_index() == 35) return;
  sync_warp();
}
CASE(bug_lane_leaves_before_sync_warp) {
  FOUND(lane_leaves_early, {"divergent barrier: ", "31 threads (the first: 32) wait at sync_warp", "have ended"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
different_collectives(ESR_ARGUMENT(Args)) {
  uint32_t a[4] = {};
  float d[4] = {};
  if (Bug && thread_index() % 32 < 16) {
    shuffle_xor(1.0f, 1);
  } else {
    multiply_add<float16>(d, a, 0, 0);
  }
}
CASE(bug_lanes_at_different_collectives) {
  FOUND(different_collectives,
        {"divergent barrier: it waits at ", "of the same warp at ", "shuffle_xor", "multiply_add<float16>"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
different_products(ESR_ARGUMENT(Args)) {
  uint32_t a[4] = {};
  float d[4] = {};
  if (Bug && thread_index() % 2 == 0) {
    multiply_add<tf32>(d, a, 0, 0);
  } else {
    multiply_add<tf32>(d, a, 0, 0);
  }
}
CASE(bug_lanes_at_different_instructions) {
  FOUND(different_products, {"divergent barrier: it waits at multiply_add<tf32>"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
different_barriers(ESR_ARGUMENT(Args)) {
  if (Bug ? thread_index() % 32 < 5 : thread_index() < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
CASE(bug_lanes_at_different_sync_blocks) { FOUND(different_barriers, {"divergent barrier: it waits at sync_block"}); }

template <bool Bug>
ESR_KERNEL(64, 1)
block_and_warp(ESR_ARGUMENT(Args)) {
  if (Bug && thread_index() >= 48) {
    sync_warp();
  } else {
    sync_block();
  }
  if (Bug && thread_index() >= 48) sync_block();
}
CASE(bug_sync_warp_against_sync_block) {
  FOUND(block_and_warp, {"divergent barrier: ", "48 threads (the first: 0) wait at sync_block",
                         "16 threads (the first: 48) wait at sync_warp"});
}

template <bool Bug>
ESR_KERNEL(64, 1)
mask_out_of_range(ESR_ARGUMENT(Args)) {
  shuffle_xor(1.0f, Bug ? 32 : 31);
}
CASE(bug_shuffle_mask) { FOUND(mask_out_of_range, {"shuffle_xor with a mask of 32"}); }

// ---- Hopper: barriers of some warps, bulk copies, products of a warpgroup ---------------------------------------

constexpr LaunchShape kOneWarpgroup{1, 1, 128, 16384};

// Two pairs of warps pass a word on and back; the fourth warp has nothing to do with it.
template <int Bug>
ESR_KERNEL(128, 1)
pass_on(ESR_ARGUMENT(Args)) {
  const int t = thread_index();
  unsigned char* shared = shared_memory();
  if (t < 32) store_shared<int>(shared + 4 * t, 0);
  sync_block();
  if (t < 32) {
    if (Bug == 1) arrive_threads(1, 64);
    store_shared<int>(shared + 4 * t, t);
    if (Bug != 1) arrive_threads(1, Bug == 2 ? 96 : 64);
    sync_threads(2, 64);
    store_shared<int>(shared + 4 * t, -t);
  } else if (t < 64) {
    sync_threads(1, 64);
    load_shared<int>(shared + 4 * (t ^ 63));
    if (Bug != 3) arrive_threads(2, 64);
    if (Bug == 4) arrive_threads(3, 64);
  }
}
template <int Bug>
void expect_barrier_bug(int line, std::initializer_list<const char*> words) {
  expect_found(line, pass_on<0>, pass_on<Bug>, words, kOneWarpgroup);
}
CASE(bug_arrives_before_it_writes) { expect_barrier_bug<1>(__LINE__, {"race: "}); }
CASE(bug_barrier_of_different_counts) {
  expect_barrier_bug<2>(__LINE__, {"divergent barrier: barrier 1 is one of", "96"});
}
CASE(bug_nobody_arrives) {
  expect_barrier_bug<3>(__LINE__, {"divergent barrier: ", "32 threads (the first: 0) wait at sync_threads"});
}
CASE(bug_arrives_where_nobody_waits) { expect_barrier_bug<4>(__LINE__, {"ends with 32 threads of 64 at barrier 3"}); }

// What a warp learns at one barrier it passes on at the next.
template <bool Bug>
ESR_KERNEL(96, 1)
pass_on_twice(ESR_ARGUMENT(Args)) {
  const int t = thread_index(), warp = t / 32;
  if (warp == 0) store_shared<int>(shared_memory() + 4 * t, t);
  if (warp == 0) arrive_threads(1, 64);
  if (warp == 1) {
    if (!Bug) sync_threads(1, 64);
    arrive_threads(2, 64);
    if (Bug) sync_threads(1, 64);
  }
  if (warp == 2) {
    sync_threads(2, 64);
    store_shared<int>(shared_memory() + 4 * (t - 64), -t);
  }
}
CASE(bug_barrier_before_the_barrier) { FOUND(pass_on_twice, {"race: "}, LaunchShape{1, 1, 96, 1024}); }

template <int Bug>
ESR_KERNEL(64, 1)
copy_in_bulk(ESR_ARGUMENT(Args) args) {
  const int t = thread_index();
  unsigned char *barrier = shared_memory(), *target = barrier + 16;
  if (t == 0) init_barrier(barrier, 1);
  if (Bug != 1) sync_block();
  if (t == (Bug == 1 ? 33 : 0)) {
    expect_bytes(barrier, Bug == 2 ? 1008 : 1536);
    copy_bulk(target, args.read + (Bug == 3 ? 8 : 0), 1024, barrier);
    copy_bulk(target + 1024, args.read + 4096, 512, barrier);
  }
  if (Bug == 4) return;
  if (Bug != 5 || t < 32) wait_for_bytes(barrier, 0);
  for (int i = t; i < 1536; i += 64) {
    store_global<unsigned char>(args.written + i, load_shared<unsigned char>(target + i));
  }
  // The next phase, to the same place.
  sync_block();
  if (t == 40) {
    expect_bytes(barrier, 16);
    copy_bulk(target, args.read + 8000, 16, barrier);
  }
  wait_for_bytes(barrier, 1);
  if (t < 16) store_global<unsigned char>(args.written + 2000 + t, load_shared<unsigned char>(target + t));
}
CASE(copies_in_bulk) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    FINE(copy_in_bulk<0>, kTwoWarps, memory);
    for (int i = 0; i < 1536; i++) {
      CHECK_EQUAL(static_cast<int>(memory.result<unsigned char>(i)),
                  memory.source<unsigned char>(i < 1024 ? i : i + 3072));
    }
    for (int i = 0; i < 16; i++) {
      CHECK_EQUAL(static_cast<int>(memory.result<unsigned char>(2000 + i)), memory.source<unsigned char>(8000 + i));
    }
  }
}
template <int Bug>
void expect_bulk_bug(int line, std::initializer_list<const char*> words) {
  expect_found(line, copy_in_bulk<0>, copy_in_bulk<Bug>, words);
}
CASE(bug_barrier_in_shared_memory_not_there_yet) { expect_bulk_bug<1>(__LINE__, {"shared memory at offset 0"}); }
CASE(bug_announces_other_bytes) { expect_bulk_bug<2>(__LINE__, {"wait at wait_for_bytes"}); }
CASE(bug_misaligned_bulk_copy) { expect_bulk_bug<3>(__LINE__, {"misaligned: a bulk copy of 1024 bytes"}); }
CASE(bug_ends_with_a_bulk_copy_in_flight) { expect_bulk_bug<4>(__LINE__, {"ends with a bulk copy in flight"}); }
CASE(bug_bulk_copy_of_another_warp) { expect_bulk_bug<5>(__LINE__, {"reads shared memory at offset"}); }

// Operands without any regularity but that of their descriptors: a [64, 16] and b [16, columns], depth fastest, lie in
// `read` as they are, b at 2048.
constexpr int kLeft = 48, kLeftLeading = 2560, kLeftStride = 304;
constexpr int kRight = 6016, kRightLeading = 1200, kRightStride = 144;

void lay_operands(Args args, int columns, bool asynchronously) {
  for (int i = thread_index(); i < 2 * (64 + columns); i += thread_count()) {
    const bool left = i < 128;
    const int row = left ? i / 2 : i / 2 - 64, chunk = i % 2;
    unsigned char* to = shared_memory() + (left ? kLeft + row / 8 * kLeftStride + chunk * kLeftLeading
                                                : kRight + row / 8 * kRightStride + chunk * kRightLeading);
    const unsigned char* from = args.read + (left ? 0 : 2048) + 32 * row + 16 * chunk;
    if (asynchronously) {
      copy_async<16>(to + row % 8 * 16, from, true);
    } else {
      store_shared<U32x4>(to + row % 8 * 16, load_global<U32x4>(from));
    }
  }
  commit_copies();
}

float sum_at(int row, int column) { return static_cast<float>(row * 64 + column); }

// [64, 8 kN] sums, plus the product of the operands twice; all bugs are somewhere in here.
enum class Bug {
  kNone,
  kNoProxyFence,
  kProxyFenceAfterBarrier,
  kNoBarrier,
  kCopyInFlight,
  kNoFence,
  kNoCommit,
  kNoWait,
  kTooFewWaits,
  kStoreBeforeWait,
  kStoreWithoutBarrier,
  kSumsWritten,
  kSwizzled,
  kOutOfRange,
  kOneWarpMore,
};

template <typename T, int kN, Bug kBug>
ESR_KERNEL(128, 1)
multiply_in_shared(ESR_ARGUMENT(Args) args) {
  const int t = thread_index(), lane = t % 32;
  lay_operands(args, 8 * kN, kBug == Bug::kCopyInFlight || kN % 2 == 0);
  if (kBug != Bug::kCopyInFlight) wait_for_copies<0>();
  if (kBug != Bug::kNoProxyFence && kBug != Bug::kProxyFenceAfterBarrier) fence_async_proxy();
  if (kBug != Bug::kNoBarrier) sync_threads(1, 128);
  if (kBug == Bug::kProxyFenceAfterBarrier) fence_async_proxy();
  float d[1][kN][4];
  for (int i = 0; i < 4 * kN; i++) {
    d[0][i / 4][i % 4] = sum_at(t / 32 * 16 + lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
  }
  const int beyond = kBug == Bug::kOutOfRange ? 16384 : 0;
  uint64_t a = matrix_descriptor(shared_memory() + kLeft + beyond, kLeftLeading, kLeftStride);
  const uint64_t b = matrix_descriptor(shared_memory() + kRight, kRightLeading, kRightStride);
  if (kBug == Bug::kSwizzled) a |= uint64_t{1} << 62;
  if (kBug != Bug::kNoFence) fence_products(d);
  multiply_add_async<T, kN>(d[0], a, b);
  if (kBug != Bug::kNoCommit) commit_products();
  if (kBug == Bug::kSumsWritten) d[0][0][0] = 0;
  multiply_add_async<T, kN>(d[0], a, b);
  if (kBug == Bug::kOneWarpMore && t < 32) multiply_add_async<T, kN>(d[0], a, b);
  if (kBug != Bug::kNoCommit) commit_products();
  unsigned char* operand = shared_memory() + kLeft + 16 * (t / 32);  // one warp's, written by the next one
  if (kBug == Bug::kStoreBeforeWait && t == 0) store_shared<U32x4>(operand, {});
  if (kBug != Bug::kNoWait) wait_for_products<kBug == Bug::kTooFewWaits ? 1 : 0>(d);
  if (kBug != Bug::kStoreWithoutBarrier) sync_block();
  if (t % 32 == 0) store_shared<U32x4>(operand, {});
  for (int i = 0; i < 4 * kN; i++) {
    store_global<float>(args.written + 4 * (4 * kN * t + i), d[0][i / 4][i % 4]);
  }
}

template <typename T, int kN>
void check_async_product() {
  const auto left = [](int row, int k) { return static_cast<float>((row * 7 + k * 3) % 61 - 30); };
  const auto right = [](int k, int column) { return static_cast<float>((column * 5 + k * 11) % 53 - 20); };
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    for (int i = 0; i < 1024; i++) memory.set_source(i, from_float<T>(left(i / 16, i % 16)));
    for (int i = 0; i < 128 * kN; i++) memory.set_source(1024 + i, from_float<T>(right(i % 16, i / 16)));
    FINE((multiply_in_shared<T, kN, Bug::kNone>), kOneWarpgroup, memory);
    // "WGMMA .m64nNk16 register fragment layout for accumulator matrix D".
    for (int t = 0; t < 128; t++) {
      for (int i = 0; i < 4 * kN; i++) {
        const int row = 16 * (t / 32) + t % 32 / 4 + (i % 4 < 2 ? 0 : 8), column = i / 4 * 8 + t % 4 * 2 + (i & 1);
        float sum = sum_at(row, column);
        for (int k = 0; k < 16; k++) sum += 2 * left(row, k) * right(k, column);
        CHECK_EQUAL(memory.result<float>(4 * kN * t + i), sum);
      }
    }
  }
}
template <typename T>
void check_async_products() {
  check_async_product<T, 1>();
  check_async_product<T, 2>();
  check_async_product<T, 3>();
  check_async_product<T, 5>();
  check_async_product<T, 8>();
}
CASE(products_of_a_warpgroup_float16) { check_async_products<float16>(); }
CASE(products_of_a_warpgroup_bfloat16) { check_async_products<bfloat16>(); }

CASE(matrix_descriptor_bits) {
  const auto kernel = [](Args) {
    const uint64_t d = matrix_descriptor(shared_memory() + 0x12340, 0x3fff0, 0x560);
    if (d != (0x56ull << 32 | 0x3fffull << 16 | 0x1234)) {
      emulator::machine().fail(emulator::Site::current(), "%llx", static_cast<unsigned long long>(d));
    }
  };
  Memory memory;
  FINE(+kernel, kOneWarp, memory);
}

template <Bug kBug>
void expect_product_bug(int line, std::initializer_list<const char*> words) {
  expect_found(line, multiply_in_shared<float16, 3, Bug::kNone>, multiply_in_shared<float16, 3, kBug>, words,
               kOneWarpgroup);
}
CASE(bug_stores_that_products_do_not_see) {
  expect_product_bug<Bug::kNoProxyFence>(__LINE__, {"missing fence: a product reads shared memory at offset"});
}
CASE(bug_fence_after_the_barrier) {
  expect_product_bug<Bug::kProxyFenceAfterBarrier>(__LINE__, {"no fence_async_proxy() and barrier after it"});
}
CASE(bug_products_of_unsynchronised_stores) { expect_product_bug<Bug::kNoBarrier>(__LINE__, {"reads shared memory"}); }
CASE(bug_products_of_copies_in_flight) { expect_product_bug<Bug::kCopyInFlight>(__LINE__, {"copy in flight: reads"}); }
CASE(bug_products_without_fence) {
  expect_product_bug<Bug::kNoFence>(__LINE__, {"missing fence: a product takes its sums from registers"});
}
CASE(bug_products_not_committed) { expect_product_bug<Bug::kNoCommit>(__LINE__, {"products in flight"}); }
CASE(bug_products_not_waited_for) { expect_product_bug<Bug::kNoWait>(__LINE__, {"products in flight"}); }
CASE(bug_waits_for_too_few_products) { expect_product_bug<Bug::kTooFewWaits>(__LINE__, {"products in flight"}); }
CASE(bug_store_over_products_in_flight) {
  expect_product_bug<Bug::kStoreBeforeWait>(__LINE__, {"products in flight: writes shared memory at offset 48"});
}
CASE(bug_store_over_products_of_other_warps) {
  expect_product_bug<Bug::kStoreWithoutBarrier>(__LINE__, {"shared memory at offset"});
}
CASE(bug_sums_of_products_in_flight) {
  expect_product_bug<Bug::kSumsWritten>(__LINE__, {"the sums of products in flight were written"});
}
CASE(bug_swizzled_descriptor) {
  expect_product_bug<Bug::kSwizzled>(__LINE__, {"a matrix descriptor with bits that only swizzled layouts have"});
}
CASE(bug_product_out_of_range) {
  expect_product_bug<Bug::kOutOfRange>(__LINE__, {"out of range: a product reads shared memory at offset"});
}
CASE(bug_warps_of_a_warpgroup_part) {
  expect_product_bug<Bug::kOneWarpMore>(__LINE__, {"have issued different numbers of products"});
}

// Until the wait the registers hold nothing.
ESR_KERNEL(128, 1) look_early(ESR_ARGUMENT(Args) args) {
  lay_operands(args, 8, false);
  fence_async_proxy();
  sync_block();
  float d[1][1][4] = {};
  fence_products(d);
  multiply_add_async<float16, 1>(d[0], matrix_descriptor(shared_memory() + kLeft, kLeftLeading, kLeftStride),
                                 matrix_descriptor(shared_memory() + kRight, kRightLeading, kRightStride));
  commit_products();
  store_global<float>(args.written + 4 * thread_index(), d[0][0][0]);
  wait_for_products<0>(d);
  store_global<float>(args.written + 512 + 4 * thread_index(), d[0][0][0]);
}
CASE(sums_arrive_with_the_wait) {
  Memory memory;
  for (int i = 0; i < 2048; i++) memory.set_source(i, from_float<float16>(1.0f));
  FINE(look_early, kOneWarpgroup, memory);
  for (int t = 0; t < 128; t++) {
    CHECK(std::isnan(memory.result<float>(t)));
    CHECK_EQUAL(memory.result<float>(128 + t), 16.0f);
  }
}

// ---- grids that overlap -----------------------------------------------------------------------------------------

template <bool Bug>
ESR_KERNEL(64, 1)
early_write(ESR_ARGUMENT(Args) args) {
  load_global<uint32_t>(args.read);  // written by no grid
  if (!Bug) wait_for_previous_grid();
  allow_next_grid();
  store_global<uint32_t>(args.written + 4 * thread_index(), 1);
  wait_for_previous_grid();
}
CASE(bug_writes_before_the_previous_grid_is_done) {
  FOUND(early_write, {"overlapping grids: writes", "before wait_for_previous_grid()"}, kTwoWarps, Way::kOverlap);
  Memory memory;
  CHECK(error_of(early_write<true>, kTwoWarps, memory.args).empty());
}

// One thread waits, a barrier tells the others.
template <bool Bug>
ESR_KERNEL(64, 1)
early_read(ESR_ARGUMENT(Args) args) {
  if (thread_index() == 0) wait_for_previous_grid();
  if (!Bug) sync_block();
  load_global<uint32_t>(args.written + 4 * thread_index());
  sync_block();
}
CASE(bug_reads_before_the_previous_grid_is_done) {
  FOUND(early_read, {"overlapping grids: reads \"output\" at byte"}, kTwoWarps, Way::kOverlap);
}

ESR_KERNEL(32, 1) write_some(ESR_ARGUMENT(Args) args) {
  wait_for_previous_grid();
  store_global<uint32_t>(args.written + 4 * thread_index(), 1);
}
CASE(output_of_an_earlier_grid_as_input) {
  Memory memory;
  alignas(16) unsigned char other[256];
  CHECK(error_of(write_some, kOneWarp, {memory.args.read, memory.args.written}, Way::kOverlap).empty());
  {
    AllowedMemory allowed;
    allowed.add(other, sizeof other, true, "an earlier output");
    CHECK(error_of(write_some, kOneWarp, {memory.args.read, other}, Way::kOverlap).empty());
  }
  AllowedMemory allowed;
  allowed.add(other, sizeof other, false, "an input");
  const Args args{other, memory.args.written};
  CHECK(error_of(read_one, kOneWarp, args, Way::kOverlap).find("reads \"an earlier output\" at byte 0") !=
        std::string::npos);
  CHECK(error_of(read_one, kOneWarp, memory.args, Way::kOverlap).empty());
  CHECK(error_of(read_one, kOneWarp, args).empty());
  CHECK(error_of(read_one, kOneWarp, args, Way::kOverlap).empty());  // all grids before the last were waited for
}

// ---- cooperative grids ------------------------------------------------------------------------------------------

constexpr LaunchShape kFourBlocks{4, 1, 64, 8192};
constexpr int kFlagsAt = 8192;  // in what is written, one for every block

uint32_t* flag_of(const Args& args, int64_t block) {
  return reinterpret_cast<uint32_t*>(args.written + kFlagsAt + 32 * block);
}
unsigned char* own_part(const Args& args, int64_t block) { return args.written + 1024 * block; }

// Every block writes a part and, several times, replaces it by the next one's, which it has copied to shared memory.
// Bugs: what is left out. A thread copies the 16 bytes of four threads.
enum class Leave { kNothing, kWait, kSyncAfterWait, kSyncBeforeFlag, kWaitForReaders, kCopiesBeforeFlag };

template <Leave kBug>
void pass_on(const Args& args) {
  const int t = thread_index();
  const int64_t mine = block_index(), next = (mine + 1) % grid_size(), last = (mine + grid_size() - 1) % grid_size();
  unsigned char* const shared = shared_memory();
  store_global<uint32_t>(own_part(args, mine) + 4 * t, static_cast<uint32_t>(100 * mine + t));
  for (uint32_t round = 0; round < 3; ++round) {
    if (kBug != Leave::kSyncBeforeFlag) sync_block();
    if (t == 0) set_flag(flag_of(args, mine), 2 * round + 1);
    if (kBug != Leave::kWait && t == 40) wait_for_flag(flag_of(args, next), 2 * round + 1);
    if (kBug != Leave::kSyncAfterWait) sync_block();
    if (t < 16) copy_async<16>(shared + 16 * t, own_part(args, next) + 16 * t, true);
    commit_copies();
    if (kBug != Leave::kCopiesBeforeFlag) wait_for_copies<0>();
    sync_block();
    if (t == 0) set_flag(flag_of(args, mine), 2 * round + 2);
    wait_for_copies<0>();
    if (kBug != Leave::kWaitForReaders && t == 0) wait_for_flag(flag_of(args, last), 2 * round + 2);
    sync_block();
    store_global<uint32_t>(own_part(args, mine) + 4 * t, load_shared<uint32_t>(shared + 4 * t));
  }
}
ESR_KERNEL(64, 1) pass_on_right(ESR_ARGUMENT(Args) args) { pass_on<Leave::kNothing>(args); }

CASE(flags_between_blocks) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    const std::string error = error_of(pass_on_right, kFourBlocks, memory.args, Way::kCooperative);
    if (!error.empty()) wrong(__LINE__, error);
    for (int block = 0; block < 4; block++) {
      for (int t = 0; t < 64; t++) CHECK_EQUAL(memory.result<uint32_t>(256 * block + t), (block + 3) % 4 * 100u + t);
    }
  }
}

#define FOUND_BETWEEN_BLOCKS(bug, ...)                                                                           \
  expect_found(__LINE__, pass_on_right, pass_on_wrong<bug>, {"race between blocks: ", __VA_ARGS__}, kFourBlocks, \
               Way::kCooperative)

template <Leave kBug>
ESR_KERNEL(64, 1)
pass_on_wrong(ESR_ARGUMENT(Args) args) {
  pass_on<kBug>(args);
}
CASE(bug_reads_without_waiting_for_the_flag) { FOUND_BETWEEN_BLOCKS(Leave::kWait, "\"output\" at byte ", "no flag"); }
CASE(bug_reads_after_another_thread_has_waited) {
  FOUND_BETWEEN_BLOCKS(Leave::kSyncAfterWait, "\"output\" at byte ", "self_test.cpp:");
}
CASE(bug_sets_a_flag_before_other_threads_have_written) {
  FOUND_BETWEEN_BLOCKS(Leave::kSyncBeforeFlag, "\"output\" at byte ", "self_test.cpp:");
}
CASE(bug_overwrites_what_another_block_reads) { FOUND_BETWEEN_BLOCKS(Leave::kWaitForReaders, "\"output\""); }
CASE(bug_sets_a_flag_before_a_copy_has_come) { FOUND_BETWEEN_BLOCKS(Leave::kCopiesBeforeFlag, "\"output\""); }

// What a block has heard of, its own flag tells as well.
ESR_KERNEL(32, 1) relay(ESR_ARGUMENT(Args) args) {
  if (thread_index() != 0) return;
  const int64_t mine = block_index();
  if (mine == 0) store_global<uint32_t>(own_part(args, 0), 7);
  if (mine > 0) wait_for_flag(flag_of(args, mine - 1), 1);
  set_flag(flag_of(args, mine), 1);
  if (mine == 3) store_global<uint32_t>(own_part(args, 3), load_global<uint32_t>(own_part(args, 0)));
}
CASE(flags_tell_what_was_heard) {
  for (const char* order : kOrders) {
    set_order(order);
    Memory memory;
    CHECK(error_of(relay, {4, 1, 32, 0}, memory.args, Way::kCooperative).empty());
    CHECK_EQUAL(memory.result<uint32_t>(768), 7u);
  }
}

template <bool Bug>
ESR_KERNEL(64, 1)
waits_first(ESR_ARGUMENT(Args) args) {
  if (!Bug && thread_index() == 0) set_flag(flag_of(args, block_index()), 1);
  if (thread_index() == 0) wait_for_flag(flag_of(args, 1 - block_index()), 1);
  sync_block();
  if (Bug && thread_index() == 0) set_flag(flag_of(args, block_index()), 1);
}
CASE(bug_every_block_waits_for_another) {
  FOUND(waits_first, {"deadlock: 1 thread (0) waits at wait_for_flag (self_test.cpp:", "wait at sync_block"}, kTwoWarps,
        Way::kCooperative);
}

// Counted round: a flag just before the end of the numbers is behind one just after it.
template <bool Bug>
ESR_KERNEL(32, 1)
never_comes(ESR_ARGUMENT(Args) args) {
  uint32_t* const flag = flag_of(args, 0);
  if (block_index() == 0 && thread_index() == 0) set_flag(flag, Bug ? 0xfffffffeu : 1u);
  if (block_index() == 1) wait_for_flag(flag, 0xffffffffu);
}
CASE(bug_waits_for_a_flag_that_nobody_sets) {
  const LaunchShape two{2, 1, 32, 0};
  for (const char* order : {"forward", "random:1"}) {
    set_order(order);
    Memory memory;
    *flag_of(memory.args, 0) = 0xfffffff0u;
    CHECK(error_of(never_comes<false>, two, memory.args, Way::kCooperative).empty());
    *flag_of(memory.args, 0) = 0xfffffff0u;
    const std::string found = error_of(never_comes<true>, two, memory.args, Way::kCooperative);
    CHECK(found.find("block (1, 0): deadlock: 32 threads (the first: 0) wait at wait_for_flag") != std::string::npos);
  }
}

// The other block is only its victim.
template <bool Bug>
ESR_KERNEL(64, 1)
diverges_before_its_flag(ESR_ARGUMENT(Args) args) {
  if (!Bug || block_index() == 0 || thread_index() < 32) sync_block();
  if (block_index() == 1 && thread_index() == 0) set_flag(flag_of(args, 1), 1);
  if (block_index() == 0) wait_for_flag(flag_of(args, 1), 1);
}
CASE(bug_a_divergent_barrier_keeps_others_waiting) {
  FOUND(diverges_before_its_flag, {"block (1, 0): divergent barrier: 32 threads (the first: 0) wait at sync_block"},
        kTwoWarps, Way::kCooperative);
}

ESR_KERNEL(32, 1) sets_own_flag(ESR_ARGUMENT(Args) args) {
  if (thread_index() == 0) set_flag(flag_of(args, block_index()), 1);
}
CASE(bug_flags_in_a_grid_that_is_not_cooperative) {
  Memory memory;
  const std::string found = error_of(sets_own_flag, kOneWarp, memory.args);
  CHECK(found.find("a flag between blocks that need not be resident") != std::string::npos);
  CHECK(error_of(sets_own_flag, kOneWarp, memory.args, Way::kCooperative).empty());
}

CASE(cooperative_grids_are_resident_at_once) {
  Memory memory;
  // Three multiprocessors of 100 KiB.
  LaunchShape shape{6, 1, 32, 49 * 1024};
  CHECK_EQUAL(resident_blocks("", sets_own_flag, shape), 6);
  CHECK(error_of(sets_own_flag, shape, memory.args, Way::kCooperative).empty());
  shape.blocks = 7;
  CHECK(error_of(sets_own_flag, shape, memory.args, Way::kCooperative) ==
        "kernel the_kernel: a cooperative grid of 7 blocks, of which 6 are resident at once");
}

// ---- launching --------------------------------------------------------------------------------------------------

ESR_KERNEL(32, 1) nothing(ESR_ARGUMENT(Args)) {}

CASE(launch_shapes) {
  const auto error = [](const LaunchShape& shape) { return error_of(nothing, shape, {}); };
  CHECK(error({1, 1, 1024, 99 * 1024}).empty());
  CHECK(error({0, 1, 32, 0}) == "kernel the_kernel: 0 blocks");
  CHECK(error({1, 65536, 32, 0}) == "kernel the_kernel: 65536 rows of blocks");
  CHECK(error({1, 1, 48, 0}).find("48 threads") != std::string::npos);
  CHECK(error({1, 1, 1056, 0}).find("1056 threads") != std::string::npos);
  CHECK(error({1, 1, 32, 99 * 1024 + 1}).find("101377 bytes of shared memory") != std::string::npos);
  const Properties before = properties();
  CHECK_EQUAL(before.capability, 86);
  set_properties({90, 132, 227 * 1024, 228 * 1024});
  CHECK_EQUAL(properties().capability, 90);
  CHECK(error({1, 1, 32, 227 * 1024}).empty());
  set_properties(before);
}

// Each thread of the process has a machine and a memory of its own.
CASE(launches_in_several_threads) {
  std::vector<std::string> errors(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < errors.size(); i++) {
    threads.emplace_back([&errors, i] {
      try {
        Memory memory;
        for (int k = 0; k < 50; k++) {
          FINE(copy_pipeline, kOneWarp, memory);
          CHECK(!error_of(missing_sync_block<true>, kTwoWarps, memory.args).empty());
        }
      } catch (const std::exception& error) {
        errors[i] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) {
    if (!error.empty()) wrong(__LINE__, error);
  }
}

// ---- time -------------------------------------------------------------------------------------------------------

ESR_KERNEL(128, 1) busy(ESR_ARGUMENT(Args) args) {
  unsigned char* shared = shared_memory();
  const int t = thread_index();
  for (int i = t; i < 512; i += 128) copy_async<16>(shared + 16 * i, args.read + 16 * i, true);
  commit_copies();
  wait_for_copies<0>();
  sync_block();
  float d[4][4] = {};
  for (int i = 0; i < 60; i++) {
    uint32_t a[4];
    load_matrices(a, shared + 16 * ((t * 3 + i) % 512));
    for (int j = 0; j < 4; j++) multiply_add<float16>(d[j], a, a[j], a[3 - j]);
  }
  for (int i = 0; i < 16; i++) store_global<float>(args.written + 4 * (16 * t + i), d[i / 4][i % 4]);
}

void print_times() {
  Memory memory;
  for (const char* order : {"forward", "reverse", "random:1"}) {
    set_order(order);
    const auto start = std::chrono::steady_clock::now();
    FINE(busy, (LaunchShape{50, 1, 128, 8192}), memory);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    std::printf("%s: %.2f ms for a block of 128 threads, 60 load_matrices and 240 multiply_add each\n", order,
                taken.count() / 50);
  }
}

int run_case(const Case& it) {
  try {
    set_order("");
    it.run();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", it.name, error.what());
    return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  int failed = 0;
  for (int i = 1; i < count; i++) {
    const std::string word = words[i];
    if (word == "--list") {
      for (const Case& it : cases()) std::printf("%s\n", it.name);
    } else if (word == "--time") {
      print_times();
    } else {
      bool known = false;
      for (const Case& it : cases()) {
        if (word != "--all" && word != it.name) continue;
        known = true;
        failed += run_case(it);
      }
      if (!known) {
        std::printf("no case %s\n", words[i]);
        failed++;
      }
    }
  }
  return failed == 0 ? 0 : 1;
}
