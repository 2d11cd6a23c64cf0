// What the kernels need of the processor beyond CUDA C++: 16-byte accesses, conversions,
// asynchronous copies and the warp-wide matrix operations of sm_80, each as PTX and, for tests that
// run the sources on a CPU, as plain C++. Includes the CUDA headers, or csrc/testing/cuda_on_cpu.h
// in their place.
//
// To stay runnable there, a kernel
//   - is launched by launch() of launch.cuh, takes its dynamic shared memory from
//     QUIETSTAR_DYNAMIC_SHARED and declares arrays with QUIETSTAR_SHARED;
//   - calls barriers, shuffles and the warp-wide functions below in converged code only.
#pragma once

#include <cassert>
#include <cstdint>
#include <type_traits>

#include "quietstar/types.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define QUIETSTAR_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define QUIETSTAR_SHARED(type, name, extents) __shared__ type name extents
#define QUIETSTAR_NOINLINE __noinline__
// Stops the device with a message, as PyTorch's own checks of indices do.
#define QUIETSTAR_REQUIRE(condition, message) assert((condition) && message)
#else
#include "cuda_on_cpu.h"
#define QUIETSTAR_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::quietstar::testing::dynamic_shared()
#define QUIETSTAR_SHARED(type, name, extents)     \
  static const char name##_key = 0;               \
  typedef type name##_type extents;               \
  name##_type& name = *static_cast<name##_type*>( \
      ::quietstar::testing::static_shared(&name##_key, sizeof(name##_type), alignof(name##_type)))
#define QUIETSTAR_NOINLINE __attribute__((noinline))
#define QUIETSTAR_REQUIRE(condition, message) \
  if (!(condition)) ::quietstar::testing::fail(QUIETSTAR_HERE, message)
#endif

namespace quietstar::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- 16 bytes at a time
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T at[size];
};

template <class T>
__device__ __forceinline__ bool is_aligned16(const T* p) {
  return (reinterpret_cast<std::uintptr_t>(p) & 15) == 0;
}

// p must be aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Pack<T> load16(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
__device__ __forceinline__ void store16(T* p, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(p) = pack;
}

// To global memory, in one instruction whatever T is: a copied Pack of 16-bit elements nvcc takes
// apart, into stores of two or four bytes each.
template <class T>
__device__ __forceinline__ void store16_global(T* p, const Pack<T>& pack) {
#ifdef __CUDACC__
  union {
    Pack<T> pack;
    uint4 bits;
  } u;
  u.pack = pack;
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(u.bits.x), "r"(u.bits.y), "r"(u.bits.z), "r"(u.bits.w)
               : "memory");
#else
  store16(p, pack);
#endif
}

// Keeps the compiler from computing an address anew, from what the loop counts, at each of its
// uses, and what is computed from a number elsewhere than here.
template <class T>
__device__ __forceinline__ void keep(T& value) {
#ifdef __CUDACC__
  if constexpr (std::is_pointer_v<T>) {
    asm volatile("" : "+l"(value));
  } else if constexpr (std::is_floating_point_v<T>) {
    asm volatile("" : "+f"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#else
  static_cast<void>(value);
#endif
}

// For data that is read once: it does not stay in L1 and leaves L2 first.
template <class T>
__device__ __forceinline__ Pack<T> load16_once(const T* p) {
#ifdef __CUDACC__
  union {
    uint4 bits;
    Pack<T> pack;
  } u;
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(u.bits.x), "=r"(u.bits.y), "=r"(u.bits.z), "=r"(u.bits.w)
               : "l"(p), "l"(policy));
  return u.pack;
#else
  return load16(p);
#endif
}

// For data that a block reads once, in loops without registers to spare for a policy of L2: it does
// not stay in L1.
template <class T>
__device__ __forceinline__ Pack<T> load16_past_l1(const T* p) {
#ifdef __CUDACC__
  union {
    uint4 bits;
    Pack<T> pack;
  } u;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(u.bits.x), "=r"(u.bits.y), "=r"(u.bits.z), "=r"(u.bits.w)
               : "l"(p));
  return u.pack;
#else
  return load16(p);
#endif
}

// ---- sixteen-bit floats
__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
#endif
}

// Rounds to the nearest, ties to even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
#ifdef __CUDACC__
  BFloat16 value;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>(bits >> 16)};
#endif
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
#ifdef __CUDACC__
  Float16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const _Float16 half = static_cast<_Float16>(x);
  Float16 value;
  std::memcpy(&value, &half, sizeof half);
  return value;
#endif
}

// Two numbers in one register, the first in the lower half.
template <class T>
__device__ __forceinline__ unsigned pack2(float lower, float upper) {
#ifdef __CUDACC__
  unsigned bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(upper), "f"(lower));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(upper), "f"(lower));
  }
  return bits;
#else
  return from_float<T>(lower).bits | static_cast<unsigned>(from_float<T>(upper).bits) << 16;
#endif
}

// The lower or the upper one of two numbers in a register.
template <class T>
__device__ __forceinline__ float number_in(unsigned pair, int upper) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
  } else {
    return to_float(T{static_cast<std::uint16_t>(upper ? pair >> 16 : pair)});
  }
}

// ---- maxima that a NaN passes through
__device__ __forceinline__ float max_nan(float a, float b) {
#ifdef __CUDACC__
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
#else
  return a != a || b != b ? __uint_as_float(0x7fffffffu) : fmaxf(a, b);
#endif
}

// Of both numbers in a register; T is BFloat16 or Float16.
template <class T>
__device__ __forceinline__ unsigned max2_nan(unsigned a, unsigned b) {
#ifdef __CUDACC__
  unsigned value;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(value) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(value) : "r"(a), "r"(b));
  }
  return value;
#else
  const auto half = [](unsigned bits) { return to_float(T{static_cast<std::uint16_t>(bits)}); };
  return pack2<T>(max_nan(half(a), half(b)), max_nan(half(a >> 16), half(b >> 16)));
#endif
}

// ---- functions of the special-function unit; relative error about 2^-22, subnormals count as 0
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#else
  // As inexact as the device's, so that a test whose margin is too small for it fails here, too.
  if (x == 0) return 1;  // which the device has exactly
  const float value =
      std::exp2(x) * (1 + 0x1p-22f * (static_cast<int>(__float_as_uint(x) % 3) - 1));
  return value < 1.17549435e-38f ? 0 : value;  // a NaN stays a NaN
#endif
}

// ---- asynchronous copies from global to shared memory, 16 bytes each
// Both addresses are aligned to 16 bytes. Where valid is false, zeros are written and `from` is not
// read. The bytes are there after commit_copies, wait_for_copies and a barrier.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  testing::start_copy(QUIETSTAR_HERE, to, from, 16, valid ? 16 : 0);
#endif
}
// The same of 4 bytes, aligned to 4.
__device__ __forceinline__ void copy4_async(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
#else
  testing::start_copy(QUIETSTAR_HERE, to, from, 4, valid ? 4 : 0);
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  testing::close_copies();
#endif
}
// Waits until at most `pending` of this thread's committed groups are under way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  testing::finish_copies(pending);
#endif
}

// ---- matrix operations of a warp (layouts: PTX manual, "Matrix fragments for mma.m16n8k16")
// With g = lane / 4 and t = lane % 4, and two 16-bit numbers in a register:
//   A 16 x 16  a[0]: row g,     columns 2t, 2t+1      a[1]: row g + 8, the same columns
//              a[2]: row g,     columns 2t+8, 2t+9    a[3]: row g + 8, the same columns
//   B 16 x 8   b[0]: rows 2t, 2t+1, column g          b[1]: rows 2t+8, 2t+9, column g
//   D 16 x 8   d[0], d[1]: row g, columns 2t, 2t+1    d[2], d[3]: row g + 8, the same columns
// and for tf32, one number in a register:
//   A 16 x 8   a[0]: row g, column t   a[1]: row g + 8   a[2]: row g, column t + 4   a[3]: row g +
//   8 B 8 x 8    b[0]: row t, column g   b[1]: row t + 4, column g

// d += A B, accumulated in fp32. T is BFloat16 or Float16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4],
                                            const unsigned (&b)[2]);

#ifdef __CUDACC__
#define QUIETSTAR_MMA(type, name)                                                          \
  template <>                                                                              \
  __device__ __forceinline__ void mma_16x8x16<type>(float (&d)[4], const unsigned (&a)[4], \
                                                    const unsigned (&b)[2]) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                    \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));      \
  }
QUIETSTAR_MMA(BFloat16, "bf16")
QUIETSTAR_MMA(Float16, "f16")
#undef QUIETSTAR_MMA

// The operands are fp32 numbers of which the unit reads the upper 19 bits; round them with to_tf32.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4],
                                                const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. The lanes 8 i .. 8 i + 7 give the
// addresses of the rows of matrix i, 16 bytes each and aligned; register i receives, of matrix i,
// row lane / 4, columns 2 (lane % 4) and the next (of the transposed matrix for load_matrices_t).
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void load_matrices_t(unsigned (&r)[4], const void* row) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
#else
}  // namespace quietstar::cuda
#include "warp_matrices.h"
namespace quietstar::cuda {
#endif

}  // namespace quietstar::cuda
