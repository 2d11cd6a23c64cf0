// CUDA's device language for a host compiler: included instead of the CUDA headers when a .cu file
// is compiled as C++ (csrc/cuda/arch.cuh does that), so that tests run the very sources on a CPU.
//
// Every thread of a block is a fiber. A fiber runs until it reaches a barrier or an operation of
// its warp, and waits there for the others; blocks run one after the other. Found on the way, and
// reported as an error that names kernel, block, thread and place:
//   - barriers that not all threads reach, or that they reach at different lines (threads that have
//     left the kernel count as missing);
//   - shuffles, votes and matrix operations whose mask names a lane that is not there, omits the
//     caller or is another one on another lane, and reads from lanes outside the mask;
//   - stores past the end of shared memory, and reads of shared memory before it was written or
//     before a copy into it was waited for: both hold NaN until then;
//   - launches that a device would refuse, shared memory beyond 48 KiB that was not asked for and
//     errors that stay behind among them (runtime.h);
//   - what depends on the order of threads or blocks, and on when a copy arrives: run forward, in
//     reverse, shuffled, and uneven with several seeds (fibers.h);
//   - what depends on a product being rounded before it is added to something: products and sums
//     are contracted as nvcc does it, where the processor has an fma.
// Reads and writes outside of global memory are the address sanitizer's part.
//
// Not modelled: time, memory ordering between blocks that wait for each other (such a kernel
// hangs), and bank conflicts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

// ---- vector types
#define QUIETSTAR_VECTOR_TYPES(type, name)                           \
  struct alignas(2 * sizeof(type)) name##2 {                         \
    type x, y;                                                       \
  };                                                                 \
  struct name##3 {                                                   \
    type x, y, z;                                                    \
  };                                                                 \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { \
    type x, y, z, w;                                                 \
  };                                                                 \
  inline name##2 make_##name##2(type x, type y) {                    \
    return {x, y};                                                   \
  }                                                                  \
  inline name##3 make_##name##3(type x, type y, type z) {            \
    return {x, y, z};                                                \
  }                                                                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) {    \
    return {x, y, z, w};                                             \
  }

QUIETSTAR_VECTOR_TYPES(int, int)
QUIETSTAR_VECTOR_TYPES(unsigned, uint)
QUIETSTAR_VECTOR_TYPES(float, float)
QUIETSTAR_VECTOR_TYPES(double, double)
QUIETSTAR_VECTOR_TYPES(short, short)
QUIETSTAR_VECTOR_TYPES(unsigned short, ushort)
#undef QUIETSTAR_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#include "fibers.h"
#include "runtime.h"

// ---- where a thread is
#define threadIdx (::quietstar::testing::self().thread)
#define blockIdx (::quietstar::testing::block().index)
#define blockDim (::quietstar::testing::block().block_size)
#define gridDim (::quietstar::testing::block().grid_size)
constexpr int warpSize = 32;

#define QUIETSTAR_HERE          \
  ::quietstar::testing::Place { \
    __FILE__, __LINE__          \
  }

// ---- barriers
#define __syncthreads() ::quietstar::testing::sync_block(QUIETSTAR_HERE, 0)
#define __syncthreads_count(predicate) \
  ::quietstar::testing::sync_block(QUIETSTAR_HERE, (predicate) ? 1 : 0)
#define __syncthreads_or(predicate) (__syncthreads_count(predicate) > 0)
#define __syncthreads_and(predicate) \
  (__syncthreads_count(predicate) == ::quietstar::testing::block().threads)
#define __syncwarp(...) (::quietstar::testing::SyncWarp{QUIETSTAR_HERE}(__VA_ARGS__))
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles and votes; the optional last argument of a shuffle is its width
#define __shfl_sync(mask, value, lane, ...)                                                        \
  ::quietstar::testing::shuffle(QUIETSTAR_HERE, mask, value, ::quietstar::testing::Shuffle::index, \
                                lane, ##__VA_ARGS__)
#define __shfl_xor_sync(mask, value, lane, ...)              \
  ::quietstar::testing::shuffle(QUIETSTAR_HERE, mask, value, \
                                ::quietstar::testing::Shuffle::exclusive, lane, ##__VA_ARGS__)
#define __shfl_down_sync(mask, value, lane, ...)                                                  \
  ::quietstar::testing::shuffle(QUIETSTAR_HERE, mask, value, ::quietstar::testing::Shuffle::down, \
                                lane, ##__VA_ARGS__)
#define __shfl_up_sync(mask, value, lane, ...)                                                  \
  ::quietstar::testing::shuffle(QUIETSTAR_HERE, mask, value, ::quietstar::testing::Shuffle::up, \
                                lane, ##__VA_ARGS__)
#define __ballot_sync(mask, predicate) \
  ::quietstar::testing::ballot(QUIETSTAR_HERE, mask, (predicate) ? 1 : 0)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == static_cast<unsigned>(mask))
#define __reduce_add_sync(mask, value) \
  ::quietstar::testing::reduce(QUIETSTAR_HERE, mask, value, ::quietstar::testing::Sum{})
#define __reduce_max_sync(mask, value) \
  ::quietstar::testing::reduce(QUIETSTAR_HERE, mask, value, ::quietstar::testing::Larger{})
#define __reduce_min_sync(mask, value) \
  ::quietstar::testing::reduce(QUIETSTAR_HERE, mask, value, ::quietstar::testing::Smaller{})

// ---- atomics: one fiber runs at a time
template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = before < value ? value : before;
  return before;
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = value < before ? value : before;
  return before;
}
template <class T>
T atomicOr(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T atomicExch(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = value;
  return before;
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

// ---- loads with a cache hint
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// ---- arithmetic
using std::max;
using std::min;
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
inline int __float_as_int(float value) {
  return static_cast<int>(__float_as_uint(value));
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1 / x;
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
// These two are never contracted with what is made of their results, nor with how their arguments
// were made: the compiler knows nothing of a number that was in memory.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  __asm__("" : "+m"(product));
  return product;
}
inline float __fadd_rn(float a, float b) {
  __asm__("" : "+m"(a), "+m"(b));
  return a + b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline int __float2int_rn(float x) {
  return static_cast<int>(std::nearbyint(x));
}
inline int __float2int_rd(float x) {
  return static_cast<int>(std::floor(x));
}
