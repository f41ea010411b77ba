// Memory that outlives calls: aligned blocks, kept for the next call that needs one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace esr {

// A block of floats aligned to a cache line, contents undefined. Blocks come from a process-wide pool, to which the
// destructor gives them back; a steady state allocates nothing. Safe to use from any thread.
class Workspace {
 public:
  explicit Workspace(int64_t floats);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
  size_t bytes_;
};

// Frees every block that is not in use.
void release_workspaces();

// Bytes in blocks, in use or kept.
int64_t workspace_bytes();

}  // namespace esr
