#include "workspace.h"

#include <deque>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace esr {
namespace {

constexpr size_t kPage = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
// Blocks not in use are kept up to this sum; the one unused for longest goes first.
constexpr size_t kMostKept = size_t{1} << 30;

struct Block {
  void* data;
  size_t bytes;
};

size_t alignment_of(size_t bytes) { return bytes >= 2 * kHugePage ? kHugePage : kPage; }

class Pool {
 public:
  Block take(size_t bytes) {
    const size_t alignment = alignment_of(bytes);
    bytes = (bytes + kPage - 1) / kPage * kPage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = kept_.end();
      for (auto b = kept_.begin(); b != kept_.end(); ++b) {
        // A far larger block is left for those who need it. One for twice as many maps is not that: a network of
        // several plans would keep a block for each of them.
        if (b->bytes < bytes || b->bytes > 4 * bytes) continue;
        if (best == kept_.end() || b->bytes < best->bytes) best = b;
      }
      if (best != kept_.end()) {
        const Block block = *best;
        kept_bytes_ -= block.bytes;
        kept_.erase(best);
        return block;
      }
      if (alignment == kHugePage) drop_largest_below(bytes);
    }
    void* data = ::operator new(bytes, std::align_val_t{alignment}, std::nothrow);
    if (data == nullptr) {
      // What is kept may be what is missing.
      clear();
      data = ::operator new(bytes, std::align_val_t{alignment});
    }
    const Block block{data, bytes};
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Feature maps are read with large strides: fewer misses in the address translation. What is left at the end would
    // take a whole page.
    if (alignment == kHugePage) madvise(block.data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    total_bytes_ += bytes;
    return block;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    drop_to(kMostKept);
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_to(0);
  }

  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(total_bytes_);
  }

 private:
  void drop_to(size_t most) {
    while (kept_bytes_ > most) drop(kept_.begin());
  }

  // What a new block is to replace: the plans of a network want one of them, the largest, not one each.
  void drop_largest_below(size_t bytes) {
    auto largest = kept_.end();
    for (auto b = kept_.begin(); b != kept_.end(); ++b) {
      if (b->bytes < bytes && (largest == kept_.end() || b->bytes > largest->bytes)) largest = b;
    }
    if (largest != kept_.end()) drop(largest);
  }

  void drop(std::deque<Block>::iterator which) {
    const Block block = *which;
    kept_.erase(which);
    kept_bytes_ -= block.bytes;
    total_bytes_ -= block.bytes;
    ::operator delete(block.data, std::align_val_t{alignment_of(block.bytes)});
  }

  std::mutex mutex_;
  std::deque<Block> kept_;
  size_t kept_bytes_ = 0;
  size_t total_bytes_ = 0;
};

// Never destroyed: threads may still hold blocks while the process ends.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

Workspace::Workspace(int64_t floats) {
  const Block block = pool().take(static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float));
  data_ = static_cast<float*>(block.data);
  bytes_ = block.bytes;
}

Workspace::~Workspace() { pool().give({data_, bytes_}); }

void release_workspaces() { pool().clear(); }

int64_t workspace_bytes() { return pool().bytes(); }

}  // namespace esr
