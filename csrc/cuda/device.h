// The primitives kernels are written with: under nvcc a thin layer over PTX, in the emulator (csrc/emulator) checked
// C++.
//
// Kernels touch memory through these functions only; that is what lets the emulator see every access.
#pragma once

#include <cstdint>

#ifdef ESR_EMULATOR
#include "../emulator/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Files without kernels are compiled by the host's compiler; what headers say of kernels they only read over.
#ifdef __CUDACC__
#define ESR_DEVICE __device__ __forceinline__
// A kernel takes one argument, a structure of plain data.
#define ESR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ESR_ARGUMENT(type) const __grid_constant__ type
#else
#define ESR_DEVICE inline
#endif

namespace esr::device {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};

// ---- memory -----------------------------------------------------------------------------------------------------

template <typename T>
ESR_DEVICE T load_shared(const void* p) {
  return *static_cast<const T*>(p);
}
template <typename T>
ESR_DEVICE void store_shared(void* p, T value) {
  *static_cast<T*>(p) = value;
}
template <typename T>
ESR_DEVICE T load_global(const void* p) {
  return *static_cast<const T*>(p);
}
template <typename T>
ESR_DEVICE void store_global(void* p, T value) {
  *static_cast<T*>(p) = value;
}

#ifdef __CUDACC__

// ---- where a thread is ------------------------------------------------------------------------------------------

ESR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ESR_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
ESR_DEVICE int64_t block_index() { return blockIdx.x; }
ESR_DEVICE int block_row() { return static_cast<int>(blockIdx.y); }
ESR_DEVICE int64_t grid_size() { return gridDim.x; }

// ---- synchronisation --------------------------------------------------------------------------------------------

ESR_DEVICE void sync_block() { __syncthreads(); }
ESR_DEVICE void sync_warp() { __syncwarp(); }

// Programmatic dependent launch: the grid before this one has finished and its writes are visible; the grid after this
// one may start. Neither does anything in a grid launched the ordinary way.
ESR_DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
ESR_DEVICE void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- shared memory ----------------------------------------------------------------------------------------------

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

// The block's dynamic shared memory, 128-byte aligned.
ESR_DEVICE unsigned char* shared_memory() { return dynamic_shared_memory; }

ESR_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 4, 8 or 16 aligned bytes, or writes zeros where `valid` is false (the source is not read then).
template <int Bytes>
ESR_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(size),
                 "n"(Bytes)
                 : "memory");
  }
}
ESR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Groups` of this thread's committed groups are under way; other threads' need a barrier besides.
template <int Groups>
ESR_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// ---- tensor cores -----------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit values (8x4 of 32-bit ones); lane 8 i + j gives the address of row j of matrix i, 16-byte
// aligned. Lane l gets 32 bits from row l / 4, at byte 4 (l % 4), of each.
ESR_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same with every 8x8 matrix of 16-bit values transposed.
ESR_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

struct tf32 {};  // the type of a product, not of a value in memory

// d += a b, accumulated in float32: [16, 16] x [16, 8] for 16-bit types, [16, 8] x [8, 8] for tf32. With g = lane / 4
// and t = lane % 4, d is rows g and g + 8 (d[0..1], d[2..3]), columns 2 t and 2 t + 1.
template <typename T>
ESR_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define ESR_MULTIPLY_ADD(type, shape, name)                                                             \
  template <>                                                                                           \
  ESR_DEVICE void multiply_add<type>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned." shape ".row.col.f32." name "." name                                         \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
ESR_MULTIPLY_ADD(float16, "m16n8k16", "f16")
ESR_MULTIPLY_ADD(bfloat16, "m16n8k16", "bf16")
ESR_MULTIPLY_ADD(tf32, "m16n8k8", "tf32")
#undef ESR_MULTIPLY_ADD

// The same for float16 with float16 sums, pairs of columns in a register: rows g (d[0]) and g + 8 (d[1]).
ESR_DEVICE void multiply_add_half(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ----------------------------------------------------------------------------------------------------

ESR_DEVICE float to_float(float v) { return v; }
ESR_DEVICE float to_float(float16 v) { return __half2float(v); }
ESR_DEVICE float to_float(bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <typename T>
ESR_DEVICE T from_float(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (__is_same(T, float16)) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// Two values of a 16-bit type in one register, the first in the low half.
template <typename T>
ESR_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t bits;
  if constexpr (__is_same(T, float16)) {
    const __half2 v = __floats2half2_rn(low, high);
    __builtin_memcpy(&bits, &v, 4);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    __builtin_memcpy(&bits, &v, 4);
  }
  return bits;
}

template <typename T>
ESR_DEVICE void unpack_pair(uint32_t bits, float& low, float& high) {
  if constexpr (__is_same(T, float16)) {
    __half2 v;
    __builtin_memcpy(&v, &bits, 4);
    low = __low2float(v), high = __high2float(v);
  } else {
    low = __uint_as_float(bits << 16), high = __uint_as_float(bits & 0xffff0000u);
  }
}

// a + b and a - b of both values, each rounded.
template <typename T>
ESR_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
  static_assert(__is_same(T, float16));
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
template <typename T>
ESR_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  static_assert(__is_same(T, float16));
  uint32_t difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

ESR_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
ESR_DEVICE float bits_float(uint32_t v) { return __uint_as_float(v); }
// The nearest tf32, ties away from zero, as a float32's bits.
ESR_DEVICE uint32_t round_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// Within 2 + |v| ulp, and 2 ulp.
ESR_DEVICE float fast_exp(float v) { return __expf(v); }
ESR_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }

// The value of lane (lane ^ mask).
ESR_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

#endif

}  // namespace esr::device

#endif
