// Reductions over a warp and over a block; every thread gets the result. The order of the sums is
// fixed, so they are the same in every run.
#pragma once

#include "arch.cuh"

namespace quietstar::cuda {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
// The larger one; a NaN is passed over.
struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? b : a; }
};

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// scratch: kThreads / 32 elements of shared memory. Every thread of the block calls it; scratch may
// be used again after the next barrier.
template <int kThreads, class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Combine combine) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps, at most 32");
  value = warp_reduce(value, combine);
  if (kThreads == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T all = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) all = combine(all, scratch[warp]);
  return all;
}

}  // namespace quietstar::cuda
