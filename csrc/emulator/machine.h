// What runs a block: its threads as fibers, its shared memory with a record of who touched what, and the checks.
//
// A thread runs until it waits at a barrier or a warp's collective instruction; whoever arrives last does the work for
// all and makes them ready again. Errors are written down where they are found and thrown by launch(); the fibers of
// the block are abandoned as they stand, so a kernel must not own anything.
//
// Time is counted in ticks, one for every barrier that completes. An access is stamped with the tick it happens at. Two
// accesses of different threads are ordered when a barrier of the block, or of the warp they share, lies between: when
// the stamp of the first is older than the last such barrier. Barriers of some warps only (named ones, and those in
// shared memory) order what the warps that meet have done or know of: every warp has a clock, for each warp the tick
// before which that one's accesses are ordered before its own.
//
// What Hopper's asynchronous proxy does besides: products of a warpgroup read shared memory from their issue until they
// are waited for, and write their sums only then; a bulk copy lands when its barrier is waited for.
//
// Blocks run one after the other, or, in a cooperative grid, are all alive and take turns where they set flags and wait
// for them. Accesses of different blocks to global memory are ordered when a flag was set after the first and waited
// for before the second: a flag carries, for every block, the time up to which whoever set it had heard of it.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"

namespace esr::device::emulator {

using Site = std::source_location;

constexpr int kLanes = 32;
constexpr int kMostWarps = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The order in which threads that could run do so, and blocks.
struct Order {
  enum Kind { kForward, kReverse, kRandom } kind = kForward;
  uint64_t seed = 0;

  // "forward", "reverse" or "random:SEED".
  static Order parse(std::string_view text) {
    constexpr std::string_view kRandomPrefix = "random:";
    if (text == "forward") return {kForward, 0};
    if (text == "reverse") return {kReverse, 0};
    if (text.starts_with(kRandomPrefix) && text.size() > kRandomPrefix.size()) {
      const std::string digits(text.substr(kRandomPrefix.size()));
      if (digits.find_first_not_of("0123456789") == std::string::npos) {
        return {kRandom, std::strtoull(digits.c_str(), nullptr, 10)};
      }
    }
    throw std::runtime_error("emulator: the order of threads is forward, reverse or random:SEED, not " +
                             std::string(text));
  }
};

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_((seed + 1) * 0x9e3779b97f4a7c15u) {}

  uint32_t below(uint32_t count) {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((z >> 32) * count) >> 32);
  }

 private:
  uint64_t state_;
};

// A range of global memory that kernels may touch.
struct Range {
  uintptr_t begin = 0, end = 0;
  bool written = false;
  std::string what;
  const void* owner = nullptr;

  bool holds(uintptr_t address, size_t bytes) const { return address >= begin && address + bytes <= end; }
  bool overlaps(uintptr_t address, size_t bytes) const { return address < end && address + bytes > begin; }
};

// What a thread waits for.
enum class Wait : uint8_t {
  kNothing,
  kBlock,
  kWarp,
  kMatrices,
  kMatricesTransposed,
  kMultiplyFloat16,
  kMultiplyBfloat16,
  kMultiplyTf32,
  kShuffle,
  kNamedBarrier,
  kArrival,
  kSharedBarrier,
  kMultiplyAsyncFloat16,
  kMultiplyAsyncBfloat16,
  kFenceProducts,
  kCommitProducts,
  kWaitForProducts,
  kFlag,
  kEnd,
};

inline const char* name_of(Wait wait) {
  constexpr const char* kNames[] = {"nothing",
                                    "sync_block",
                                    "sync_warp",
                                    "load_matrices",
                                    "load_matrices_transposed",
                                    "multiply_add<float16>",
                                    "multiply_add<bfloat16>",
                                    "multiply_add<tf32>",
                                    "shuffle_xor",
                                    "sync_threads",
                                    "arrive_threads",
                                    "wait_for_bytes",
                                    "multiply_add_async<float16>",
                                    "multiply_add_async<bfloat16>",
                                    "fence_products",
                                    "commit_products",
                                    "wait_for_products",
                                    "wait_for_flag",
                                    "the end"};
  return kNames[static_cast<int>(wait)];
}

// The asynchronous copies of one thread. Their bytes move when they are waited for, no earlier.
struct Copies {
  struct Copy {
    uint32_t offset;
    uint32_t bytes;
    const void* source;  // null: zeros
    Site site;
    bool tracked = false;  // other blocks may write the source
  };

  std::vector<Copy> copies;
  std::vector<size_t> groups;  // where each ends
  size_t first_copy = 0, first_group = 0;

  bool empty() const { return first_copy == copies.size(); }

  void clear() {
    copies.clear();
    groups.clear();
    first_copy = first_group = 0;
  }
};

// Which accesses of a block of a cooperative grid others know to be over: those before its barrier `start`, and those
// of one thread up to a time.
struct Heard {
  uint32_t start = 0;
  int thread = -1;
  uint32_t now = 0;

  void add(const Heard& other) {
    start = std::max(start, other.start);
    if (other.now > now) thread = other.thread, now = other.now;
  }
};
using News = std::vector<Heard>;  // one for every block

inline void add(News& to, const News& news) {
  if (to.size() < news.size()) to.resize(news.size());
  for (size_t i = 0; i < news.size(); i++) to[i].add(news[i]);
}

struct Thread {
  Context context;
  Copies copies;
  Site site;                   // of what it waits for
  uint32_t fence = 0;          // the tick of its last fence_async_proxy()
  uint32_t fence_in_time = 0;  // of the last one before a barrier
  Wait wait = Wait::kNothing;
  bool waited_for_grid = false;
  News news;  // from flags, not yet passed on to its block by a barrier
};

// One entry for each warp and one for the asynchronous proxy: what it did before this tick is known.
constexpr int kAsyncProxy = kMostWarps;
constexpr int kAsyncThread = kAsyncProxy * kLanes;  // as the writer of a byte
using Clock = std::array<uint32_t, kMostWarps + 1>;

inline void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], from[i]);
}

// A barrier that some warps of a block come to: bar.sync and bar.arrive.
struct NamedBarrier {
  int expected = 0, arrived = 0;  // threads
  uint32_t waiting = 0;           // warps
  Clock clock = {};
  Site site;
};

// A barrier in shared memory, with the bulk copies that report to it.
struct SharedBarrier {
  uint32_t offset = 0;
  int expected = 0, missing = 0;  // arrivals of a phase
  int64_t bytes = 0;              // that were announced for this phase
  uint32_t phase = 0;             // how many have completed
  std::vector<Copies::Copy> copies;
  std::vector<int> waiting;  // threads
  Clock clock = {};
};

// The most that one warp's part of an asynchronous product holds: 16 rows of 64 columns.
constexpr int kMostAsyncSums = 32;  // of a lane

// Sums of products in flight. The registers they belong to hold a pattern that must stay until they are waited for.
struct AsyncSums {
  static constexpr uint32_t kPattern = 0xffffffffu;  // as a float, a NaN

  float* registers[kLanes];
  int count;     // of a lane
  size_t group;  // the last one with a product that adds to them
  float values[kLanes][kMostAsyncSums];
};

// 16 bytes of shared memory as products see them.
struct ProductUnit {
  uint32_t in_flight = 0;                      // products that read it and are not waited for
  uint32_t readers = 0;                        // warps whose products have
  std::array<uint32_t, kMostWarps> read = {};  // the tick of each one's last wait
  Site site;                                   // of the last product
};

struct Warp {
  uint32_t ready = 0;    // lanes that could run
  uint32_t arrived = 0;  // lanes at the collective
  uint32_t arrived_at_barrier = 0;
  uint32_t start = 0;  // the tick of the last barrier
  Wait wait = Wait::kNothing;

  // Operands and results of a collective, by lane.
  alignas(64) uint32_t a[kLanes][4];
  alignas(64) float d[kLanes][4];
  alignas(64) uint32_t b[kLanes][2];
  const unsigned char* rows[kLanes];
  float values[kLanes];
  int masks[kLanes];

  // At a named barrier: which, for how many threads, whether to wait; whether the warp does.
  int barrier[kLanes], barrier_threads[kLanes];
  bool parked = false;

  // Asynchronous products: operands of a lane, and what is in flight.
  struct Descriptors {
    uint64_t a, b;
  };
  Descriptors descriptors[kLanes];
  float* registers[kLanes];
  int groups[kLanes];
  std::vector<AsyncSums> async_sums;
  std::vector<uint32_t> product_units;  // numbers of ProductUnits, in the order of issue
  std::vector<size_t> product_groups;   // where each group that is in flight ends
  size_t first_group = 0;               // the number of the first of them
  uint64_t products = 0;                // in this block
  bool products_fenced = false;
};

// Who touched a byte of shared memory last. Stamps of earlier blocks are older than the block's first tick.
struct alignas(16) Cell {
  static constexpr uint32_t kInFlight = 0xffffffffu;  // as `written`: the target of a copy that `writer` issued
  static constexpr uint16_t kThread = 0x03ff;
  static constexpr uint16_t kSeveralLanes = 0x4000;  // of the reader's warp, since its last barrier
  static constexpr uint16_t kSeveralWarps = 0x8000;  // since the block's last barrier

  uint32_t written, read;
  uint16_t writer, reader;
  uint16_t write_site, read_site;

  int writing_thread() const { return writer; }
  int reading_thread() const { return reader & kThread; }
};
static_assert(sizeof(Cell) == 16);

// Who touched two bytes of global memory, in a cooperative grid.
struct GlobalCell {
  struct Access {
    int64_t number;  // of the block
    int thread;
    uint32_t time;
    Site site;
  };

  std::vector<Access> write, reads;  // the last one; the last one of every block since
};

// A block as it stands.
struct Block {
  int thread = 0;  // the one that runs
  int64_t block = 0;
  int row = 0;
  int64_t number = 0;
  unsigned char* shared = nullptr;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  uint32_t ready_warps_ = 0;
  int at_barrier_ = 0;
  int running_ = 0;
  Random random_;
  std::unique_ptr<Stacks> stacks_ = std::make_unique<Stacks>();

  std::unique_ptr<unsigned char[]> memory_;
  std::vector<Cell> cells_;
  uint32_t tick_ = 0;
  uint32_t block_begin_ = 0;      // the block's first tick
  uint32_t block_start_ = 0;      // the tick of its last barrier
  bool waited_for_grid_ = false;  // some thread of the block did
  News news_;                     // of other blocks

  static constexpr int kNamedBarriers = 16;  // number 0 is sync_block()
  std::array<Clock, kMostWarps> clocks_ = {};
  std::array<NamedBarrier, kNamedBarriers> named_barriers_;
  std::vector<SharedBarrier> shared_barriers_;
  std::vector<ProductUnit> product_units_;
  bool products_used_ = false;  // in this block
};

class Machine : private Block {
 public:
  // ---- for kernels ----------------------------------------------------------------------------------------------

  using Block::block;
  using Block::row;
  using Block::shared;
  using Block::thread;
  int threads = 0;
  int64_t blocks = 0;

  [[gnu::noinline]] void sync_block(Site site) {
    Warp& warp = this->warp();
    if (warp.arrived_at_barrier != 0) {
      // Lanes of one warp come to a barrier by the same instruction.
      const int other = first_thread(warp.arrived_at_barrier);
      if (!same(threads_[other].site, site)) diverged(Wait::kBlock, site, other);
    }
    warp.arrived_at_barrier |= lane_bit();
    threads_[thread].wait = Wait::kBlock;
    threads_[thread].site = site;
    threads_[thread].fence_in_time = threads_[thread].fence;
    if (++at_barrier_ == threads) {
      at_barrier_ = 0;
      block_start_ = ++tick_;
      for (int w = 0; w < threads / kLanes; w++) {
        warps_[w].start = tick_;
        warps_[w].arrived_at_barrier = 0;
        warps_[w].ready = kAllLanes;
      }
      ready_warps_ = all_warps();
      if (waited_for_grid_) {
        for (int t = 0; t < threads; t++) threads_[t].waited_for_grid = true;
      }
      if (cooperative_) {
        for (int t = 0; t < threads; t++) {
          add(news_, threads_[t].news);
          threads_[t].news.clear();
        }
      }
    }
    leave();
    threads_[thread].wait = Wait::kNothing;
  }

  // Goes on when the flag has come to `value`, counted round.
  [[gnu::noinline]] void wait_for_flag(const uint32_t* flag, uint32_t value, Site site) {
    check_flag<false>(flag, site);
    Thread& me = threads_[thread];
    me.site = site;
    while (!reached(*flag, value)) {
      me.wait = Wait::kFlag;
      waiting_.push_back({number, thread, flag, value});
      leave();
    }
    me.wait = Wait::kNothing;
    const auto set = flags_.find(flag);
    if (set != flags_.end()) add(me.news, set->second);
  }

  [[gnu::noinline]] void set_flag(uint32_t* flag, uint32_t value, Site site) {
    check_flag<true>(flag, site);
    News& told = flags_[flag];
    told = news_;
    add(told, threads_[thread].news);
    told.resize(std::max(told.size(), static_cast<size_t>(number) + 1));
    told[static_cast<size_t>(number)] = {block_start_, thread, tick_++};
    *flag = value;
    std::erase_if(waiting_, [&](const Waiting& it) {
      if (it.flag != flag || !reached(value, it.value)) return false;
      Block& own = *this;
      make_ready(it.number == number ? own : resident_[static_cast<size_t>(it.number)], it.thread);
      return true;
    });
    // Others may go on first.
    make_ready(*this, thread);
    switch_context(threads_[thread].context, main_);
  }

  // All lanes of the warp meet; the last does the work.
  [[gnu::noinline]] void meet(Wait wait, bool same_instruction, Site site, void (*work)(Machine&, Warp&)) {
    Warp& warp = this->warp();
    if (warp.arrived == 0) {
      warp.wait = wait;
    } else {
      const int other = first_thread(warp.arrived);
      if (warp.wait != wait || (same_instruction && !same(threads_[other].site, site))) diverged(wait, site, other);
    }
    warp.arrived |= lane_bit();
    threads_[thread].wait = wait;
    threads_[thread].site = site;
    if (warp.arrived == kAllLanes) {
      warp.arrived = 0;
      work(*this, warp);
      if (!warp.parked) resume(thread / kLanes);
    }
    leave();
    threads_[thread].wait = Wait::kNothing;
  }

  void sync_warp(Site site) {
    meet(Wait::kWarp, false, site, [](Machine& machine, Warp& warp) {
      warp.start = ++machine.tick_;
      machine.publish_fences();
    });
  }

  // ---- barriers of some warps -----------------------------------------------------------------------------------

  // `count` threads, in whole warps, come to barrier `id`; those that do not wait go on at once.
  void named_barrier(int id, int count, bool wait, Site site) {
    Warp& warp = this->warp();
    if (id < 1 || id >= kNamedBarriers) fail(site, "barrier %d, where there are 1 to %d", id, kNamedBarriers - 1);
    if (count < kLanes || count > threads || count % kLanes != 0) {
      fail(site, "barrier %d of %d threads, which are not whole warps of the block", id, count);
    }
    warp.barrier[lane()] = id;
    warp.barrier_threads[lane()] = count;
    meet(wait ? Wait::kNamedBarrier : Wait::kArrival, true, site,
         [](Machine& machine, Warp& w) { machine.arrive(w, machine.threads_[machine.thread].wait); });
  }

  // ---- barriers in shared memory, and bulk copies -----------------------------------------------------------------

  void init_barrier(void* p, int count, Site site) {
    const uint32_t offset = shared_offset(p, 8, "initialises a barrier in", site);
    std::memset(write_shared<8>(p, site), 0, 8);
    if (count < 1) fail(site, "a barrier of %d arrivals", count);
    std::erase_if(shared_barriers_, [&](const SharedBarrier& b) { return b.offset == offset; });
    SharedBarrier& b = shared_barriers_.emplace_back();
    b.offset = offset;
    b.expected = b.missing = count;
  }

  // The thread arrives, and announces that so many bytes will.
  void expect_bytes(const void* p, int64_t bytes, Site site) {
    SharedBarrier& b = shared_barrier(p, site);
    if (b.missing == 0) fail(site, "one arrival too many at a barrier of %d", b.expected);
    b.missing--;
    b.bytes += bytes;
    join(b.clock, own_clock());
    b.clock[static_cast<size_t>(thread / kLanes)] = ++tick_;
    complete(b);
  }

  void issue_bulk_copy(void* target, const void* source, uint32_t bytes, const void* barrier, Site site) {
    if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
      fail(site, "misaligned: a bulk copy of %u bytes from %p", bytes, source);
    }
    shared_offset(target, 16, "copies to", site);
    for (uint32_t i = 0; i < bytes; i += 16) {
      check_global<16, false>(static_cast<const unsigned char*>(source) + i, site);
      const uint32_t offset = shared_offset(static_cast<unsigned char*>(target) + i, 16, "copies to", site);
      write_cells(offset, 16, Cell::kInFlight, site);
    }
    SharedBarrier& b = shared_barrier(barrier, site);
    b.copies.push_back({shared_offset(target, 16, "copies to", site), bytes, source, site});
    complete(b);
  }

  // Until phase number `parity` mod 2 has completed.
  void wait_for_bytes(const void* p, int parity, Site site) {
    const size_t number = static_cast<size_t>(&shared_barrier(p, site) - shared_barriers_.data());
    if ((shared_barriers_[number].phase & 1) == static_cast<uint32_t>(parity)) {
      shared_barriers_[number].waiting.push_back(thread);
      threads_[thread].wait = Wait::kSharedBarrier;
      threads_[thread].site = site;
      if (!complete(shared_barriers_[number])) leave();
      threads_[thread].wait = Wait::kNothing;
    }
    join(own_clock(), shared_barriers_[number].clock);
  }

  // ---- the asynchronous proxy -------------------------------------------------------------------------------------

  // What the thread has written so far will be seen by the asynchronous proxy.
  void fence_async_proxy() { threads_[thread].fence = ++tick_; }

  // The warp's products read 16 bytes at this address of shared memory.
  const unsigned char* read_for_product(uint32_t offset, Site site) {
    if (offset % 16 != 0 || offset + 16 > shared_bytes_) {
      fail(site, "out of range: a product reads shared memory at offset %u of %zu", offset, shared_bytes_);
    }
    Cell before = {};
    for (uint32_t i = offset; i < offset + 16; i++) {
      Cell& cell = cells_[i];
      if (i > offset && equal(cell, before)) continue;
      before = cell;
      check_written(cell, i, true, site);
      if (cell.writer != kAsyncThread && cell.written >= threads_[cell.writer].fence_in_time) {
        fail(site,
             "missing fence: a product reads shared memory at offset %u, which thread %d wrote (%s) with no "
             "fence_async_proxy() and barrier after it",
             i, cell.writing_thread(), site_text(cell.write_site).c_str());
      }
    }
    ProductUnit& unit = product_units_[offset / 16];
    unit.in_flight++;
    unit.site = site;
    warp().product_units.push_back(offset / 16);
    products_used_ = true;
    return shared + offset;
  }

  // The sums that the warp's registers stand for, from now on in flight.
  AsyncSums& take_sums(Warp& warp, int count, Site site) {
    const size_t open = warp.first_group + warp.product_groups.size();
    const auto touched = [&](const AsyncSums& sums) {
      for (int l = 0; l < kLanes; l++) {
        for (int i = 0; i < count; i++) {
          if (std::bit_cast<uint32_t>(sums.registers[l][i]) != AsyncSums::kPattern) return true;
        }
      }
      return false;
    };
    for (AsyncSums& sums : warp.async_sums) {
      if (sums.registers[0] != warp.registers[0]) continue;
      if (touched(sums)) fail(site, "the sums of products in flight were written before they were waited for");
      sums.group = open;
      return sums;
    }
    if (!warp.products_fenced) {
      fail(site, "missing fence: a product takes its sums from registers with no fence_products() before it");
    }
    AsyncSums& sums = warp.async_sums.emplace_back();
    sums.count = count;
    sums.group = open;
    for (int l = 0; l < kLanes; l++) {
      sums.registers[l] = warp.registers[l];
      std::memcpy(sums.values[l], warp.registers[l], static_cast<size_t>(count) * 4);
      std::memset(warp.registers[l], 0xff, static_cast<size_t>(count) * 4);
    }
    return sums;
  }

  void fence_products(Site site) {
    meet(Wait::kFenceProducts, true, site, [](Machine&, Warp& w) { w.products_fenced = true; });
  }

  void commit_products(Site site) {
    meet(Wait::kCommitProducts, true, site,
         [](Machine&, Warp& w) { w.product_groups.push_back(w.product_units.size()); });
  }

  // Until at most `groups` of the warp's committed groups are under way.
  void wait_for_products(int groups, Site site) {
    warp().groups[lane()] = groups;
    meet(Wait::kWaitForProducts, true, site, [](Machine& machine, Warp& w) { machine.finish_products(w); });
  }

  Warp& warp() { return warps_[thread / kLanes]; }
  int lane() const { return thread % kLanes; }
  // Where the running thread has come to meet others.
  Site site() const { return threads_[static_cast<size_t>(thread)].site; }

  void wait_for_previous_grid() { threads_[thread].waited_for_grid = waited_for_grid_ = true; }

  // WholeWarp: the warp reads, not the thread; then even the thread's own writes need a barrier before and after.
  template <uint32_t Bytes, bool WholeWarp>
  [[gnu::noinline]] const unsigned char* read_shared(const void* p, Site site) {
    const uint32_t offset = shared_offset(p, Bytes, "reads", site);
    const uint16_t id = site_id(site);
    Cell* cells = &cells_[offset];
    Cell before = {}, after = {};
    for (uint32_t i = 0; i < Bytes; i++) {
      if (i > 0 && equal(cells[i], before)) {
        cells[i] = after;
        continue;
      }
      before = cells[i];
      read_cell<WholeWarp>(cells[i], offset + i, id, site);
      after = cells[i];
    }
    return shared + offset;
  }

  template <uint32_t Bytes>
  [[gnu::noinline]] unsigned char* write_shared(void* p, Site site) {
    const uint32_t offset = shared_offset(p, Bytes, "writes", site);
    write_cells(offset, Bytes, tick_, site);
    return shared + offset;
  }

  template <uint32_t Bytes>
  [[gnu::noinline]] void issue_copy(void* target, const void* source, bool valid, Site site) {
    const uint32_t offset = shared_offset(target, Bytes, "copies to", site);
    if (valid) {
      check_global<Bytes, false>(source, site);
    } else if (reinterpret_cast<uintptr_t>(source) % Bytes != 0) {
      misaligned("copies from", source, Bytes, site);
    }
    // From here on until the wait, nobody may touch the target.
    write_cells(offset, Bytes, Cell::kInFlight, site);
    threads_[thread].copies.copies.push_back(
        {offset, Bytes, valid ? source : nullptr, site, valid && cooperative_ && last_read_->written});
  }

  void commit_copies() {
    Copies& mine = threads_[thread].copies;
    mine.groups.push_back(mine.copies.size());
  }

  void wait_for_copies(size_t groups) {
    Copies& mine = threads_[thread].copies;
    while (mine.groups.size() - mine.first_group > groups) {
      const size_t end = mine.groups[mine.first_group++];
      for (; mine.first_copy < end; mine.first_copy++) deliver(mine.copies[mine.first_copy]);
    }
    if (mine.first_group == mine.groups.size() && mine.empty()) {
      mine.clear();
    } else if (mine.first_copy > 4096) {
      mine.copies.erase(mine.copies.begin(), mine.copies.begin() + static_cast<ptrdiff_t>(mine.first_copy));
      mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<ptrdiff_t>(mine.first_group));
      for (size_t& end : mine.groups) end -= mine.first_copy;
      mine.first_copy = mine.first_group = 0;
    }
  }

  template <uint32_t Bytes, bool Write>
  void check_global(const void* p, Site site) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address % Bytes != 0) misaligned(Write ? "writes" : "reads", p, Bytes, site);
    if (!(Write ? last_write_ : last_read_)->holds(address, Bytes)) find_range(address, Bytes, Write, site);
    if (overlap_ && !threads_[thread].waited_for_grid) check_overlap(address, Bytes, Write, site);
    if (cooperative_ && (Write || last_read_->written)) track(address, Bytes, Write, site);
  }

  [[noreturn]] [[gnu::cold]] [[gnu::format(printf, 3, 4)]] void fail(Site site, const char* format, ...) {
    char text[1536];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    std::snprintf(message_, sizeof message_, "kernel %s, block (%lld, %d), thread %d at %s:%u: %s", name_,
                  static_cast<long long>(block), row, thread, file_of(site), static_cast<unsigned>(site.line()), text);
    stop();
  }

  // ---- for the host ---------------------------------------------------------------------------------------------

  // The calling thread's.
  static Machine& mine() {
    // Not the machine itself: a library that is loaded at run time gets little thread-local memory of the fast kind.
    static thread_local std::unique_ptr<Machine> machine;
    if (machine == nullptr) machine = std::make_unique<Machine>();
    return *machine;
  }

  std::vector<Range> ranges;

  void allow(const void* owner, const void* p, int64_t bytes, bool written, const char* what) {
    if (bytes < 0) throw std::runtime_error("emulator: a range of negative length was allowed");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    ranges.push_back({begin, begin + static_cast<uintptr_t>(bytes), written, what, owner});
  }

  void disallow(const void* owner) {
    std::erase_if(ranges, [&](const Range& range) { return range.owner == owner; });
    if (ranges.empty()) unfinished_.clear();
  }

  using Invoke = void (*)(void (*kernel)(), const void* args);

  void run(const char* name, Invoke invoke, void (*kernel)(), const void* args, int64_t block_count, int row_count,
           int thread_count, int shared_bytes, bool overlap, bool cooperative, const Order& order) {
    name_ = name;
    invoke_ = invoke;
    kernel_ = kernel;
    args_ = args;
    blocks = block_count;
    threads = thread_count;
    overlap_ = overlap;
    cooperative_ = cooperative;
    order_ = order;
    waiting_.clear();
    shared_bytes_ = static_cast<size_t>(shared_bytes);
    last_read_ = last_write_ = &nothing_;
    if (sites_used_ > kSites / 2 || sites_.empty()) {
      sites_.assign(kSites, nullptr);
      sites_used_ = 0;
    }
    // A grid that is not launched to overlap starts when all before it are done.
    if (!overlap) unfinished_.clear();
    const int64_t total = block_count * row_count;
    std::vector<int64_t> shuffled;
    if (order.kind == Order::kRandom) {
      Random random(order.seed);
      for (int64_t i = 0; i < total; i++) shuffled.push_back(i);
      for (int64_t i = total - 1; i > 0; i--) {
        std::swap(shuffled[static_cast<size_t>(i)], shuffled[random.below(static_cast<uint32_t>(i + 1))]);
      }
    }
    if (cooperative) {
      run_together(total);
    } else {
      for (int64_t i = 0; i < total; i++) {
        run_block(order.kind == Order::kForward   ? i
                  : order.kind == Order::kReverse ? total - 1 - i
                                                  : shuffled[static_cast<size_t>(i)]);
      }
    }
    for (const Range& range : ranges) {
      const auto known = [&](const Range& r) { return r.begin == range.begin && r.end == range.end; };
      if (range.written && std::none_of(unfinished_.begin(), unfinished_.end(), known)) unfinished_.push_back(range);
    }
  }

  static Machine*& current() {
    // Set while a kernel runs.
    static thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;
    return machine;
  }

 private:
  static bool equal(const Cell& x, const Cell& y) { return __builtin_memcmp(&x, &y, sizeof x) == 0; }

  static bool same(const Site& x, const Site& y) {
    return key_of(x) == key_of(y) || (x.line() == y.line() && std::strcmp(x.file_name(), y.file_name()) == 0);
  }

  static const void* key_of(const Site& site) {
    static_assert(sizeof(Site) == sizeof(const void*));
    return std::bit_cast<const void*>(site);
  }

  static const char* file_of(const Site& site) {
    const char* slash = std::strrchr(site.file_name(), '/');
    return slash != nullptr ? slash + 1 : site.file_name();
  }

  static std::string text_of(const Site& site) {
    return std::string(file_of(site)) + ":" + std::to_string(site.line());
  }

  // ---- scheduling -----------------------------------------------------------------------------------------------

  uint32_t lane_bit() const { return uint32_t{1} << (thread % kLanes); }
  uint32_t all_warps() const {
    const int count = threads / kLanes;
    return count == kMostWarps ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
  }
  // A thread of the running thread's warp.
  int first_thread(uint32_t lanes) const { return thread / kLanes * kLanes + std::countr_zero(lanes); }

  static int choose(uint32_t set, const Order& order, Random& random) {
    if (order.kind == Order::kForward) return std::countr_zero(set);
    if (order.kind == Order::kReverse) return 31 - std::countl_zero(set);
    for (uint32_t skip = random.below(static_cast<uint32_t>(std::popcount(set))); skip > 0; skip--) set &= set - 1;
    return std::countr_zero(set);
  }

  // Takes the next thread that could run; there is one.
  int take() {
    const int w = choose(ready_warps_, order_, random_);
    Warp& warp = warps_[w];
    const int lane = choose(warp.ready, order_, random_);
    warp.ready &= ~(uint32_t{1} << lane);
    if (warp.ready == 0) ready_warps_ &= ~(uint32_t{1} << w);
    return w * kLanes + lane;
  }

  // Runs others until the thread is ready and its turn has come.
  void leave() {
    Context& from = threads_[thread].context;
    if (ready_warps_ == 0) {
      switch_context(from, main_);
      return;
    }
    const int next = take();
    if (next == thread) return;
    thread = next;
    switch_context(from, threads_[next].context);
  }

  [[noreturn]] void stop() {
    failed_ = true;
    switch_context(threads_[thread].context, main_);
    std::abort();
  }

  static void enter() {
    Machine& machine = *current();
    try {
      machine.invoke_(machine.kernel_, machine.args_);
    } catch (const std::exception& error) {
      std::snprintf(machine.message_, sizeof machine.message_, "kernel %s: %s", machine.name_, error.what());
      machine.failed_ = true;
    }
    if (machine.failed_) machine.stop();
    Thread& me = machine.threads_[machine.thread];
    if (!me.copies.empty()) {
      machine.fail(me.copies.copies[me.copies.first_copy].site,
                   "the thread ends with copies in flight: %zu issued and not waited for, the first here",
                   me.copies.copies.size() - me.copies.first_copy);
    }
    if (!machine.warp().async_sums.empty()) {
      machine.fail(machine.product_units_[machine.warp().product_units.back()].site,
                   "the warp ends with products in flight, the last one here");
    }
    me.wait = Wait::kEnd;
    machine.running_--;
    machine.leave();
    std::abort();
  }

  static void make_ready(Block& it, int thread) {
    it.warps_[static_cast<size_t>(thread / kLanes)].ready |= uint32_t{1} << (thread % kLanes);
    it.ready_warps_ |= uint32_t{1} << (thread / kLanes);
  }

  // Makes a block that has not begun of the present one.
  void begin_block(int64_t begun) {
    number = begun;
    block = begun % blocks;
    row = static_cast<int>(begun / blocks);
    stacks_->reserve(threads);
    if (threads_.size() < static_cast<size_t>(threads)) threads_ = std::vector<Thread>(static_cast<size_t>(threads));
    if (warps_.empty()) warps_ = std::vector<Warp>(kMostWarps);
    if (cells_.size() < shared_bytes_ || shared == nullptr) {
      cells_.assign(shared_bytes_, Cell{});
      product_units_.assign(shared_bytes_ / 16 + 1, ProductUnit{});
      memory_ = std::make_unique<unsigned char[]>(shared_bytes_ + 512);
      // 128-byte aligned, and no better.
      const uintptr_t start = (reinterpret_cast<uintptr_t>(memory_.get()) + 255) / 256 * 256 + 128;
      shared = reinterpret_cast<unsigned char*>(start);
    }
    if (tick_ > 0x80000000u) {
      std::fill(cells_.begin(), cells_.end(), Cell{});
      std::fill(product_units_.begin(), product_units_.end(), ProductUnit{});
      clocks_ = {};
      tick_ = 0;
    }
    std::memset(shared, 0xff, shared_bytes_);
    block_begin_ = block_start_ = ++tick_;
    at_barrier_ = 0;
    running_ = threads;
    failed_ = false;
    waited_for_grid_ = false;
    news_.clear();
    random_ = Random(order_.seed + static_cast<uint64_t>(number) * 0x2545f4914f6cdd1du);
    for (int t = 0; t < threads; t++) {
      Thread& it = threads_[static_cast<size_t>(t)];
      it.wait = Wait::kNothing;
      it.waited_for_grid = false;
      it.fence = it.fence_in_time = 0;
      it.copies.clear();
      it.news.clear();
      stacks_->start(t, it.context, &Machine::enter);
    }
    for (int w = 0; w < threads / kLanes; w++) {
      Warp& it = warps_[static_cast<size_t>(w)];
      it.arrived = it.arrived_at_barrier = 0;
      it.start = tick_;
      it.ready = kAllLanes;
      it.parked = it.products_fenced = false;
      it.products = 0;
      it.async_sums.clear();
      it.product_units.clear();
      it.product_groups.clear();
      it.first_group = 0;
    }
    named_barriers_ = {};
    shared_barriers_.clear();
    products_used_ = false;
    ready_warps_ = all_warps();
  }

  // Runs the present block's threads until none can go on, one has failed, or another block may take its turn.
  void take_turn() {
    current() = this;
    thread = take();
    switch_context(main_, threads_[static_cast<size_t>(thread)].context);
    current() = nullptr;
  }

  void run_block(int64_t begun) {
    begin_block(begun);
    take_turn();
    if (!failed_ && running_ > 0) describe_deadlock();
    if (!failed_) check_end();
    if (failed_) {
      forget_accesses();
      throw std::runtime_error(message_);
    }
  }

  // Of a block that has failed: copies in flight never land.
  void forget_accesses() {
    std::fill(cells_.begin(), cells_.end(), Cell{});
    std::fill(product_units_.begin(), product_units_.end(), ProductUnit{});
  }

  // All blocks of a cooperative grid.
  void run_together(int64_t total) {
    if (resident_.size() < static_cast<size_t>(total)) resident_.resize(static_cast<size_t>(total));
    flags_.clear();
    global_.clear();
    const auto change = [&](size_t i) { std::swap(static_cast<Block&>(*this), resident_[i]); };
    const auto each = [&](const auto& function) {
      for (size_t i = 0; i < static_cast<size_t>(total); i++) function(i);
    };
    each([&](size_t i) {
      change(i);
      begin_block(static_cast<int64_t>(i));
      change(i);
    });
    Random random(order_.seed);
    std::vector<size_t> ready;
    while (!failed_) {
      ready.clear();
      each([&](size_t i) {
        if (resident_[i].ready_warps_ != 0) ready.push_back(i);
      });
      if (ready.empty()) break;
      const size_t next = order_.kind == Order::kForward   ? ready.front()
                          : order_.kind == Order::kReverse ? ready.back()
                                                           : ready[random.below(static_cast<uint32_t>(ready.size()))];
      change(next);
      take_turn();
      change(next);
    }
    // A block with threads at different barriers is what the others wait for.
    for (const bool at_flag : {false, true}) {
      each([&](size_t i) {
        if (failed_ || resident_[i].running_ == 0 || waits_for_flag(resident_[i]) != at_flag) return;
        change(i);
        describe_deadlock();
        change(i);
      });
    }
    each([&](size_t i) {
      change(i);
      if (!failed_) check_end();
      change(i);
    });
    if (failed_) {
      each([&](size_t i) {
        change(i);
        forget_accesses();
        change(i);
      });
      throw std::runtime_error(message_);
    }
  }

  bool waits_for_flag(const Block& it) const {
    return std::any_of(waiting_.begin(), waiting_.end(), [&](const Waiting& w) { return w.number == it.number; });
  }

  [[noreturn]] [[gnu::cold]] void diverged(Wait wait, Site site, int other) {
    const Thread& it = threads_[static_cast<size_t>(other)];
    fail(site, "divergent barrier: it waits at %s, thread %d of the same warp at %s (%s)", name_of(wait), other,
         name_of(it.wait), text_of(it.site).c_str());
  }

  // Nobody can run and not all have ended.
  [[gnu::cold]] void describe_deadlock() {
    struct Group {
      Wait wait;
      Site site;
      int first, count;
    };
    std::vector<Group> groups;
    for (int t = 0; t < threads; t++) {
      const Thread& it = threads_[static_cast<size_t>(t)];
      const auto found = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
        return group.wait == it.wait && (it.wait == Wait::kEnd || same(group.site, it.site));
      });
      if (found != groups.end()) {
        found->count++;
      } else {
        groups.push_back({it.wait, it.site, t, 1});
      }
    }
    std::string text;
    for (const Group& group : groups) {
      if (!text.empty()) text += ", ";
      text += std::to_string(group.count) + (group.count == 1 ? " thread (" : " threads (the first: ") +
              std::to_string(group.first) + ") ";
      if (group.wait == Wait::kEnd) {
        text += group.count == 1 ? "has ended" : "have ended";
      } else {
        text += std::string(group.count == 1 ? "waits at " : "wait at ") + name_of(group.wait) + " (" +
                text_of(group.site) + ")";
      }
    }
    std::snprintf(message_, sizeof message_, "kernel %s, block (%lld, %d): %s: %s", name_,
                  static_cast<long long>(block), row, waits_for_flag(*this) ? "deadlock" : "divergent barrier",
                  text.c_str());
    failed_ = true;
  }

  // ---- shared memory --------------------------------------------------------------------------------------------

  uint32_t shared_offset(const void* p, uint32_t bytes, const char* verb, Site site) {
    const intptr_t offset = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(shared);
    const intptr_t size = static_cast<intptr_t>(shared_bytes_);
    if (offset < 0 || offset + static_cast<intptr_t>(bytes) > size) out_of_shared(p, offset, bytes, verb, site);
    if (offset % bytes != 0) {
      fail(site, "misaligned: %s %u bytes of shared memory at offset %lld", verb, bytes,
           static_cast<long long>(offset));
    }
    return static_cast<uint32_t>(offset);
  }

  [[noreturn]] [[gnu::cold]] void out_of_shared(const void* p, intptr_t offset, uint32_t bytes, const char* verb,
                                                Site site) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    for (const Range& range : ranges) {
      if (range.holds(address, 1)) {
        fail(site, "out of range: %s %u bytes of shared memory at %p, which is byte %llu of \"%s\" in global memory",
             verb, bytes, p, static_cast<unsigned long long>(address - range.begin), range.what.c_str());
      }
    }
    if (offset < -(1 << 18) || offset > (1 << 18)) {
      fail(site, "out of range: %s %u bytes of shared memory at %p, which is none", verb, bytes, p);
    }
    fail(site, "out of range: %s %u bytes of shared memory at offset %lld of %zu", verb, bytes,
         static_cast<long long>(offset), shared_bytes_);
  }

  // Another thread's access is ordered before what the running thread does now.
  bool ordered(uint32_t stamp, int other) const {
    if (stamp < block_start_) return true;
    const size_t mine = static_cast<size_t>(thread / kLanes), its = static_cast<size_t>(other / kLanes);
    return stamp < clocks_[mine][its] || (its == mine && stamp < warps_[mine].start);
  }

  void check_written(const Cell& cell, uint32_t offset, bool whole_warp, Site site) {
    if (cell.written == Cell::kInFlight) in_flight(cell, offset, "reads", site);
    if (cell.written < block_begin_) {
      fail(site, "uninitialised: reads shared memory at offset %u, which nobody has written in this block", offset);
    }
    if ((whole_warp || cell.writer != thread) && !ordered(cell.written, cell.writing_thread())) {
      race(cell, offset, "reads", true, site);
    }
  }

  template <bool WholeWarp>
  void read_cell(Cell& cell, uint32_t offset, uint16_t id, Site site) {
    check_written(cell, offset, WholeWarp, site);
    const uint16_t me = static_cast<uint16_t>(thread | (WholeWarp ? Cell::kSeveralLanes : 0));
    if (cell.read < block_start_) {
      cell.reader = me;
    } else if (cell.reading_thread() / kLanes != thread / kLanes) {
      cell.reader |= Cell::kSeveralWarps;
    } else if (cell.read < warps_[static_cast<size_t>(thread / kLanes)].start) {
      cell.reader = static_cast<uint16_t>(me | (cell.reader & Cell::kSeveralWarps));
    } else if (WholeWarp || cell.reading_thread() != thread) {
      cell.reader |= Cell::kSeveralLanes;
    }
    cell.read = tick_;
    cell.read_site = id;
  }

  void write_cells(uint32_t offset, uint32_t bytes, uint32_t stamp, Site site) {
    if (products_used_) {
      for (uint32_t i = offset / 16; i * 16 < offset + bytes; i++) check_products(product_units_[i], i * 16, site);
    }
    const uint16_t id = site_id(site);
    Cell* cells = &cells_[offset];
    Cell before = {}, after = {};
    for (uint32_t i = 0; i < bytes; i++) {
      if (i > 0 && equal(cells[i], before)) {
        cells[i] = after;
        continue;
      }
      before = cells[i];
      write_cell(cells[i], offset + i, stamp, id, site);
      after = cells[i];
    }
  }

  void write_cell(Cell& cell, uint32_t offset, uint32_t stamp, uint16_t id, Site site) {
    const char* verb = stamp == Cell::kInFlight ? "copies to" : "writes";
    if (cell.written == Cell::kInFlight) in_flight(cell, offset, verb, site);
    if (cell.writer != thread && !ordered(cell.written, cell.writing_thread())) race(cell, offset, verb, true, site);
    if (cell.read >= block_start_) {
      const int other = cell.reading_thread();
      const bool alone = other == thread && (cell.reader & Cell::kSeveralLanes) == 0;
      if ((cell.reader & Cell::kSeveralWarps) != 0 || (!alone && !ordered(cell.read, other))) {
        race(cell, offset, verb, false, site);
      }
    }
    cell.written = stamp;
    cell.writer = static_cast<uint16_t>(thread);
    cell.write_site = id;
  }

  // Nobody may write what products in flight read, nor what a warp's products have read that this thread has not met
  // since that warp waited for them.
  void check_products(ProductUnit& unit, uint32_t offset, Site site) {
    if (unit.in_flight > 0) {
      fail(site,
           "products in flight: writes shared memory at offset %u, which they read (%s) until they are waited for",
           offset, text_of(unit.site).c_str());
    }
    if (unit.readers == 0) return;
    for (uint32_t left = unit.readers; left != 0; left &= left - 1) {
      const int reader = std::countr_zero(left) * kLanes;
      if (!ordered(unit.read[static_cast<size_t>(reader / kLanes)], reader)) {
        fail(site,
             "race: writes shared memory at offset %u, which products of threads %d to %d read (%s), with no "
             "barrier between",
             offset, reader, reader + kLanes - 1, text_of(unit.site).c_str());
      }
    }
    unit.readers = 0;
  }

  void deliver(const Copies::Copy& copy) {
    if (copy.tracked) track(reinterpret_cast<uintptr_t>(copy.source), copy.bytes, false, copy.site);
    if (copy.source != nullptr) {
      std::memcpy(shared + copy.offset, copy.source, copy.bytes);
    } else {
      std::memset(shared + copy.offset, 0, copy.bytes);
    }
    for (uint32_t i = 0; i < copy.bytes; i++) cells_[copy.offset + i].written = tick_;
  }

  [[noreturn]] [[gnu::cold]] void in_flight(const Cell& cell, uint32_t offset, const char* verb, Site site) {
    fail(site,
         "copy in flight: %s shared memory at offset %u, the target of a copy of thread %d (%s) not yet waited for",
         verb, offset, cell.writing_thread(), site_text(cell.write_site).c_str());
  }

  [[noreturn]] [[gnu::cold]] void race(const Cell& cell, uint32_t offset, const char* verb, bool with_write,
                                       Site site) {
    const int other = with_write ? cell.writing_thread() : cell.reading_thread();
    const char* also = with_write                                 ? ""
                       : (cell.reader & Cell::kSeveralWarps) != 0 ? " among others of several warps"
                       : (cell.reader & Cell::kSeveralLanes) != 0 ? " among others of its warp"
                                                                  : "";
    const char* missing = other / kLanes == thread / kLanes && also[0] == '\0' ? "sync_warp or sync_block" : "barrier";
    fail(site, "race: %s shared memory at offset %u, which thread %d%s %s (%s), with no %s between", verb, offset,
         other, also, with_write ? "wrote" : "read", site_text(with_write ? cell.write_site : cell.read_site).c_str(),
         missing);
  }

  // ---- barriers of some warps, the asynchronous proxy -------------------------------------------------------------

  Clock& own_clock() { return clocks_[static_cast<size_t>(thread / kLanes)]; }

  void resume(int w) {
    warps_[static_cast<size_t>(w)].parked = false;
    warps_[static_cast<size_t>(w)].ready = kAllLanes;
    ready_warps_ |= uint32_t{1} << w;
  }

  // Fences of the running thread's warp count from its next barrier on.
  void publish_fences() {
    for (int t = thread / kLanes * kLanes, end = t + kLanes; t < end; t++) {
      threads_[static_cast<size_t>(t)].fence_in_time = threads_[static_cast<size_t>(t)].fence;
    }
  }

  // All lanes of the running warp have come to the named barrier.
  void arrive(Warp& warp, Wait wait) {
    const int mine = thread / kLanes, id = warp.barrier[lane()], count = warp.barrier_threads[lane()];
    const Site site = this->site();
    for (int l = 0; l < kLanes; l++) {
      if (warp.barrier[l] != id || warp.barrier_threads[l] != count) {
        fail(site, "divergent barrier: lanes of a warp come to barriers %d and %d", id, warp.barrier[l]);
      }
    }
    NamedBarrier& b = named_barriers_[static_cast<size_t>(id)];
    if (b.arrived > 0 && b.expected != count) {
      fail(site, "divergent barrier: barrier %d is one of %d threads here and one of %d elsewhere (%s)", id, count,
           b.expected, text_of(b.site).c_str());
    }
    b.expected = count;
    b.site = site;
    b.arrived += kLanes;
    publish_fences();
    // What the warp does from now on has no earlier stamp than what others learn of.
    join(b.clock, own_clock());
    b.clock[static_cast<size_t>(mine)] = ++tick_;
    if (wait == Wait::kNamedBarrier) {
      b.waiting |= uint32_t{1} << mine;
      warp.parked = true;
    }
    if (b.arrived < b.expected) return;
    for (uint32_t left = b.waiting; left != 0; left &= left - 1) {
      const int w = std::countr_zero(left);
      join(clocks_[static_cast<size_t>(w)], b.clock);
      if (w != mine) resume(w);
    }
    warp.parked = false;
    b = {};
  }

  SharedBarrier& shared_barrier(const void* p, Site site) {
    const uint32_t offset = shared_offset(p, 8, "a barrier in", site);
    read_shared<8, false>(p, site);
    for (SharedBarrier& b : shared_barriers_) {
      if (b.offset == offset) return b;
    }
    fail(site, "shared memory at offset %u is no barrier", offset);
  }

  // Ends the barrier's phase if somebody waits for it and everything has arrived; whether it did.
  bool complete(SharedBarrier& b) {
    int64_t bytes = 0;
    for (const Copies::Copy& copy : b.copies) bytes += copy.bytes;
    if (b.waiting.empty() || b.missing > 0 || bytes != b.bytes) return false;
    tick_++;
    for (const Copies::Copy& copy : b.copies) {
      deliver(copy);
      for (uint32_t i = 0; i < copy.bytes; i++) cells_[copy.offset + i].writer = kAsyncThread;
    }
    b.clock[kAsyncProxy] = ++tick_;
    b.copies.clear();
    b.bytes = 0;
    b.missing = b.expected;
    b.phase++;
    for (const int t : b.waiting) {
      if (t == thread) continue;
      warps_[static_cast<size_t>(t / kLanes)].ready |= uint32_t{1} << (t % kLanes);
      ready_warps_ |= uint32_t{1} << (t / kLanes);
    }
    const bool mine = std::find(b.waiting.begin(), b.waiting.end(), thread) != b.waiting.end();
    b.waiting.clear();
    return mine;
  }

  void finish_products(Warp& warp) {
    const size_t mine = static_cast<size_t>(thread / kLanes);
    const size_t left = static_cast<size_t>(warp.groups[lane()]);
    const size_t done = warp.product_groups.size() > left ? warp.product_groups.size() - left : 0;
    if (done > 0) {
      const size_t end = warp.product_groups[done - 1];
      for (size_t i = 0; i < end; i++) {
        ProductUnit& unit = product_units_[warp.product_units[i]];
        unit.in_flight--;
        unit.readers |= uint32_t{1} << mine;
        unit.read[mine] = tick_;
      }
      warp.product_units.erase(warp.product_units.begin(), warp.product_units.begin() + static_cast<ptrdiff_t>(end));
      warp.product_groups.erase(warp.product_groups.begin(),
                                warp.product_groups.begin() + static_cast<ptrdiff_t>(done));
      for (size_t& group_end : warp.product_groups) group_end -= end;
      warp.first_group += done;
    }
    for (const AsyncSums& sums : warp.async_sums) {
      if (sums.group >= warp.first_group) continue;
      for (int l = 0; l < kLanes; l++) {
        std::memcpy(sums.registers[l], sums.values[l], static_cast<size_t>(sums.count) * 4);
      }
    }
    std::erase_if(warp.async_sums, [&](const AsyncSums& sums) { return sums.group < warp.first_group; });
    warp.products_fenced = false;
  }

  // What must be over when all threads have ended.
  void check_end() {
    std::string why;
    for (const SharedBarrier& b : shared_barriers_) {
      if (!b.copies.empty()) why = "ends with a bulk copy in flight (" + text_of(b.copies[0].site) + ")";
    }
    for (size_t w = 0; w < static_cast<size_t>(threads / kLanes); w++) {
      if (warps_[w].products != warps_[w & ~size_t{3}].products) {
        why = "warps " + std::to_string(w & ~size_t{3}) + " and " + std::to_string(w) +
              " of a warpgroup have issued different numbers of products";
      }
    }
    for (size_t i = 0; i < named_barriers_.size(); i++) {
      if (named_barriers_[i].arrived > 0) {
        why = "ends with " + std::to_string(named_barriers_[i].arrived) + " threads of " +
              std::to_string(named_barriers_[i].expected) + " at barrier " + std::to_string(i) + " (" +
              text_of(named_barriers_[i].site) + ")";
      }
    }
    if (why.empty()) return;
    std::snprintf(message_, sizeof message_, "kernel %s, block (%lld, %d): %s", name_, static_cast<long long>(block),
                  row, why.c_str());
    failed_ = true;
  }

  // ---- sites by number: a cell has no room for a pointer --------------------------------------------------------

  static constexpr size_t kSites = 1 << 12;

  uint16_t site_id(const Site& site) {
    const void* key = key_of(site);
    size_t slot = (reinterpret_cast<uintptr_t>(key) >> 3) * 0x9e3779b97f4a7c15u >> 52;
    while (sites_[slot] != key) {
      if (sites_[slot] == nullptr) {
        if (sites_used_ + 1 == kSites) break;
        sites_[slot] = key;
        sites_used_++;
        break;
      }
      slot = (slot + 1) % kSites;
    }
    return static_cast<uint16_t>(slot);
  }

  std::string site_text(uint16_t id) const {
    const void* key = sites_[id];
    return text_of(std::bit_cast<Site>(key));
  }

  // ---- global memory --------------------------------------------------------------------------------------------

  [[noreturn]] [[gnu::cold]] void misaligned(const char* verb, const void* p, uint32_t bytes, Site site) {
    fail(site, "misaligned: %s %u bytes of global memory at %p", verb, bytes, p);
  }

  [[gnu::noinline]] void find_range(uintptr_t address, uint32_t bytes, bool write, Site site) {
    for (const Range& range : ranges) {
      if (range.holds(address, bytes) && (range.written || !write)) {
        (write ? last_write_ : last_read_) = &range;
        return;
      }
    }
    out_of_global(address, bytes, write, site);
  }

  [[noreturn]] [[gnu::cold]] void out_of_global(uintptr_t address, uint32_t bytes, bool write, Site site) {
    const char* verb = write ? "writes" : "reads";
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared);
    if (offset < shared_bytes_) {
      fail(site, "out of range: %s %u bytes of global memory at %p, which is byte %llu of shared memory", verb, bytes,
           reinterpret_cast<void*>(address), static_cast<unsigned long long>(offset));
    }
    const Range* nearest = nullptr;
    uintptr_t distance = ~uintptr_t{0};
    for (const Range& range : ranges) {
      if (range.holds(address, bytes)) {
        fail(site, "read-only: writes %u bytes of global memory at %p, byte %llu of \"%s\", which may only be read",
             bytes, reinterpret_cast<void*>(address), static_cast<unsigned long long>(address - range.begin),
             range.what.c_str());
      }
      const uintptr_t away = address < range.begin ? range.begin - address
                             : address > range.end ? address - range.end
                                                   : 0;
      if (away < distance) {
        distance = away;
        nearest = &range;
      }
    }
    if (nearest == nullptr) {
      fail(site, "out of range: %s %u bytes of global memory at %p; no memory is allowed", verb, bytes,
           reinterpret_cast<void*>(address));
    }
    fail(site, "out of range: %s %u bytes of global memory at %p, which is byte %lld of \"%s\" of %llu bytes", verb,
         bytes, reinterpret_cast<void*>(address), static_cast<long long>(address - nearest->begin),
         nearest->what.c_str(), static_cast<unsigned long long>(nearest->end - nearest->begin));
  }

  // Before wait_for_previous_grid(): no writes, and no reads of what grids in flight may write.
  [[gnu::noinline]] void check_overlap(uintptr_t address, uint32_t bytes, bool write, Site site) {
    if (write) {
      fail(site, "overlapping grids: writes global memory at %p before wait_for_previous_grid()",
           reinterpret_cast<void*>(address));
    }
    for (const std::vector<Range>* list : {&ranges, &unfinished_}) {
      for (const Range& range : *list) {
        if (range.written && range.overlaps(address, bytes)) {
          fail(site, "overlapping grids: reads \"%s\" at byte %lld before wait_for_previous_grid()", range.what.c_str(),
               static_cast<long long>(address - range.begin));
        }
      }
    }
  }

  // ---- flags, and what they order -------------------------------------------------------------------------------

  static bool reached(uint32_t flag, uint32_t value) { return static_cast<int32_t>(flag - value) >= 0; }

  template <bool Write>
  void check_flag(const uint32_t* flag, Site site) {
    if (!cooperative_) fail(site, "a flag between blocks that need not be resident: the grid is not cooperative");
    const uintptr_t address = reinterpret_cast<uintptr_t>(flag);
    if (address % 4 != 0) misaligned(Write ? "writes" : "reads", flag, 4, site);
    if (!(Write ? last_write_ : last_read_)->holds(address, 4)) find_range(address, 4, Write, site);
    if (overlap_ && !threads_[thread].waited_for_grid) check_overlap(address, 4, Write, site);
  }

  // Another block's access is over, and known to be, before what the running thread does now.
  bool heard_of(const GlobalCell::Access& access) const {
    const auto in = [&](const News& news) {
      const size_t i = static_cast<size_t>(access.number);
      return i < news.size() &&
             (access.time < news[i].start || (access.thread == news[i].thread && access.time <= news[i].now));
    };
    return access.number == number || in(news_) || in(threads_[static_cast<size_t>(thread)].news);
  }

  [[gnu::noinline]] void track(uintptr_t address, uint32_t bytes, bool write, Site site) {
    const GlobalCell::Access mine{number, thread, tick_, site};
    for (uintptr_t place = address / 2; place <= (address + bytes - 1) / 2; place++) {
      GlobalCell& cell = global_[place];
      for (const auto& access : cell.write) {
        if (!heard_of(access)) global_race(address, write, access, true, site);
      }
      if (write) {
        for (const auto& access : cell.reads) {
          if (!heard_of(access)) global_race(address, write, access, false, site);
        }
        cell.reads.clear();
        cell.write.assign(1, mine);
        continue;
      }
      const auto before =
          std::find_if(cell.reads.begin(), cell.reads.end(), [&](const auto& it) { return it.number == number; });
      if (before == cell.reads.end()) {
        cell.reads.push_back(mine);
      } else {
        *before = mine;
      }
    }
  }

  [[noreturn]] [[gnu::cold]] void global_race(uintptr_t address, bool write, const GlobalCell::Access& access,
                                              bool with_write, Site site) {
    const Range& range = *(write ? last_write_ : last_read_);
    fail(site,
         "race between blocks: %s \"%s\" at byte %lld, which thread %d of block (%lld, %lld) %s (%s), with no flag "
         "set and waited for between",
         write ? "writes" : "reads", range.what.c_str(), static_cast<long long>(address - range.begin), access.thread,
         static_cast<long long>(access.number % blocks), static_cast<long long>(access.number / blocks),
         with_write ? "wrote" : "read", text_of(access.site).c_str());
  }

  // ---- state ----------------------------------------------------------------------------------------------------

  Context main_;
  Order order_;
  size_t shared_bytes_ = 0;

  struct Waiting {
    int64_t number;  // of the block
    int thread;
    const uint32_t* flag;
    uint32_t value;
  };
  bool cooperative_ = false;
  std::vector<Block> resident_;  // all but the running one
  std::vector<Waiting> waiting_;
  std::unordered_map<const uint32_t*, News> flags_;
  std::unordered_map<uintptr_t, GlobalCell> global_;

  const Range nothing_;
  const Range* last_read_ = nullptr;
  const Range* last_write_ = nullptr;
  bool overlap_ = false;
  std::vector<Range> unfinished_;  // written by grids that may be under way

  std::vector<const void*> sites_;
  size_t sites_used_ = 0;

  const char* name_ = "";
  Invoke invoke_ = nullptr;
  void (*kernel_)() = nullptr;
  const void* args_ = nullptr;
  bool failed_ = false;
  char message_[2048] = {};
};

}  // namespace esr::device::emulator
