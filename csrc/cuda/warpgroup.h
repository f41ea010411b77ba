// The primitives of Hopper: products of a warpgroup (four warps) that read both operands from shared memory while the
// threads go on, barriers of some warps, and bulk copies. Under nvcc PTX of sm_90a, in the emulator checked C++.
#pragma once

#include "device.h"

#ifdef ESR_EMULATOR
#include "../emulator/warpgroup.h"
#else

namespace esr::device {

#ifdef __CUDACC__

// ---- barriers ---------------------------------------------------------------------------------------------------

// Barriers 1 to 15 of some warps of a block: `threads` threads come, those that only arrive go on at once.
ESR_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
ESR_DEVICE void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A barrier of 8 bytes in shared memory, which other threads may use after the block's next barrier. A phase completes
// when so many threads have arrived and all announced bytes have landed.
ESR_DEVICE void init_barrier(void* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// The thread arrives, and announces bytes for this phase.
ESR_DEVICE void expect_bytes(void* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Copies a multiple of 16 bytes, 16-byte aligned; its arrival is the barrier's business.
ESR_DEVICE void copy_bulk(void* shared, const void* global, int bytes, void* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Until phase number `parity` mod 2 has completed.
ESR_DEVICE void wait_for_bytes(void* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// What the thread has written to shared memory so far will be seen by products and bulk copies, once a barrier has told
// the threads that issue them.
ESR_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products ---------------------------------------------------------------------------------------------------

// d += a b of [64, 16] x [16, 8 kN], accumulated in float32; a and b are descriptors, the same in all threads. Warp w
// of the warpgroup has rows 16 w ... 16 w + 15, in its lanes as multiply_add() has them. The sums may not be touched,
// nor the operands written, until the product is waited for.
template <typename T, int kN>
ESR_DEVICE void multiply_add_async(float (&d)[kN][4], uint64_t a, uint64_t b);

#define ESR_SUMS_1 "%0, %1, %2, %3"
#define ESR_SUMS_2 ESR_SUMS_1 ", %4, %5, %6, %7"
#define ESR_SUMS_3 ESR_SUMS_2 ", %8, %9, %10, %11"
#define ESR_SUMS_4 ESR_SUMS_3 ", %12, %13, %14, %15"
#define ESR_SUMS_5 ESR_SUMS_4 ", %16, %17, %18, %19"
#define ESR_SUMS_6 ESR_SUMS_5 ", %20, %21, %22, %23"
#define ESR_SUMS_7 ESR_SUMS_6 ", %24, %25, %26, %27"
#define ESR_SUMS_8 ESR_SUMS_7 ", %28, %29, %30, %31"
#define ESR_TILE(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define ESR_TILES_1 ESR_TILE(0)
#define ESR_TILES_2 ESR_TILES_1, ESR_TILE(1)
#define ESR_TILES_3 ESR_TILES_2, ESR_TILE(2)
#define ESR_TILES_4 ESR_TILES_3, ESR_TILE(3)
#define ESR_TILES_5 ESR_TILES_4, ESR_TILE(4)
#define ESR_TILES_6 ESR_TILES_5, ESR_TILE(5)
#define ESR_TILES_7 ESR_TILES_6, ESR_TILE(6)
#define ESR_TILES_8 ESR_TILES_7, ESR_TILE(7)
// %a and %b: the numbers of the operands that follow the sums. The immediates: d is added to, nothing negated, both
// operands with depth running fastest.
#define ESR_MULTIPLY_ASYNC(type, name, tiles, columns, a_at, b_at)                                 \
  template <>                                                                                      \
  ESR_DEVICE void multiply_add_async<type, tiles>(float (&d)[tiles][4], uint64_t a, uint64_t b) {  \
    asm volatile(                                                                                  \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." name "." name " {" ESR_SUMS_##tiles \
        "}, " a_at ", " b_at ", add, 1, 1, 0, 0;\n}"                                               \
        : ESR_TILES_##tiles                                                                        \
        : "l"(a), "l"(b));                                                                         \
  }
#define ESR_MULTIPLY_ASYNC_BOTH(tiles, columns, a_at, b_at)      \
  ESR_MULTIPLY_ASYNC(float16, "f16", tiles, columns, a_at, b_at) \
  ESR_MULTIPLY_ASYNC(bfloat16, "bf16", tiles, columns, a_at, b_at)
ESR_MULTIPLY_ASYNC_BOTH(1, "8", "%4", "%5")
ESR_MULTIPLY_ASYNC_BOTH(2, "16", "%8", "%9")
ESR_MULTIPLY_ASYNC_BOTH(3, "24", "%12", "%13")
ESR_MULTIPLY_ASYNC_BOTH(4, "32", "%16", "%17")
ESR_MULTIPLY_ASYNC_BOTH(5, "40", "%20", "%21")
ESR_MULTIPLY_ASYNC_BOTH(6, "48", "%24", "%25")
ESR_MULTIPLY_ASYNC_BOTH(7, "56", "%28", "%29")
ESR_MULTIPLY_ASYNC_BOTH(8, "64", "%32", "%33")
#undef ESR_MULTIPLY_ASYNC_BOTH
#undef ESR_MULTIPLY_ASYNC
#undef ESR_TILES_1
#undef ESR_TILES_2
#undef ESR_TILES_3
#undef ESR_TILES_4
#undef ESR_TILES_5
#undef ESR_TILES_6
#undef ESR_TILES_7
#undef ESR_TILES_8
#undef ESR_TILE
#undef ESR_SUMS_1
#undef ESR_SUMS_2
#undef ESR_SUMS_3
#undef ESR_SUMS_4
#undef ESR_SUMS_5
#undef ESR_SUMS_6
#undef ESR_SUMS_7
#undef ESR_SUMS_8

// Keeps the compiler from moving what reads or writes these sums to the other side.
template <int kM, int kN>
ESR_DEVICE void pin(float (&d)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM * kN * 4; ++i) asm volatile("" : "+f"(d[i / (4 * kN)][i / 4 % kN][i % 4])::"memory");
}

// Before products that add to sums which the threads have written.
template <int kM, int kN>
ESR_DEVICE void fence_products(float (&d)[kM][kN][4]) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
ESR_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Groups` of the warp's committed groups are under way; those of other warps need a barrier
// besides.
template <int Groups, int kM, int kN>
ESR_DEVICE void wait_for_products(float (&d)[kM][kN][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
  pin(d);
}

// The value of the warp's first lane, which all lanes have: tells the compiler so.
ESR_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

#endif

}  // namespace esr::device

#endif

namespace esr::device {

// Where a product finds an operand: rows (columns, of the right one) in groups of eight, 16 bytes a row, one behind the
// other; `leading` bytes from values 0-7 of a row to values 8-15, `stride` bytes from a group to the next. Everything
// is a multiple of 16 and less than 2^18. Bits 0-13 are the start, 16-29 `leading`, 32-45 `stride`, all over 16; the
// bits above are zeros in this layout, the one without swizzling. An offset over 16 may be added to a descriptor.
ESR_DEVICE uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  const uint64_t fields = (leading >> 4 << 16) | (shared_address(start) >> 4);
  return fields | uint64_t{stride >> 4} << 32;
}

}  // namespace esr::device
