// Stacks to run the threads of a block on, and the switch from one to another.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(ESR_EMULATOR_UCONTEXT)
#define ESR_EMULATOR_UCONTEXT
#endif
#ifdef ESR_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace esr::device::emulator {

#ifdef ESR_EMULATOR_UCONTEXT

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void start_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#else

// Assembly and not an inline function, so that no compiler draws conclusions from its body.
extern "C" __attribute__((visibility("hidden"))) void esr_emulator_switch(void** save, void* to);
asm(R"(
.pushsection .text.esr_emulator_switch,"axG",@progbits,esr_emulator_switch,comdat
.weak esr_emulator_switch
.hidden esr_emulator_switch
.type esr_emulator_switch,@function
.p2align 4
esr_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size esr_emulator_switch,.-esr_emulator_switch
.popsection
)");

struct Context {
  void* stack_pointer = nullptr;
};

inline void switch_context(Context& from, Context& to) { esr_emulator_switch(&from.stack_pointer, to.stack_pointer); }

inline void start_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // where entry() would return to; it does not
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
}

#endif

// One stack for each thread of a block, kept from block to block. Below each lies a page that faults when touched.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(int count) {
    if (count <= count_) return;
    release();
    void* memory = mmap(nullptr, static_cast<size_t>(count) * pitch_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    count_ = count;
    for (int i = 0; i < count; i++) mprotect(memory_ + static_cast<size_t>(i) * pitch_, page_, PROT_NONE);
  }

  void start(int i, Context& context, void (*entry)()) {
    // Tops at the same place of a page would all fall into the same few sets of the first cache.
    const size_t shift = static_cast<size_t>(i) * 448 % 4096;
    start_context(context, memory_ + static_cast<size_t>(i) * pitch_ + page_, kBytes + 4096 - shift, entry);
  }

 private:
  static constexpr size_t kBytes = 64 << 10;

  void release() {
    if (memory_ != nullptr) munmap(memory_, static_cast<size_t>(count_) * pitch_);
    memory_ = nullptr;
    count_ = 0;
  }

  size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  size_t pitch_ = (page_ + kBytes + 4096 + page_ - 1) / page_ * page_;
  unsigned char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace esr::device::emulator
