// Kernels of the mixing head around its matrix products; what is computed stands in
// quietstar/mixing_head.h. All are bound by memory. Reads and writes of 16 bytes a thread, 2 bytes
// an element in bf16:
//   first           reads product (4 bytes), writes h1                                  6 bytes
//   tail            reads h2, thought, writes mixed                                     6 bytes
//   tail backward   reads grad_mixed, thought, h2, writes grad_thought, grad_h2        10 bytes
//   first backward  reads grad_h1, h1, grad_mixed, writes grad_h1                       8 bytes
// an element and row, plus the base rows, which several rows share and L2 keeps. A product with a
// matrix is 2 width operations an element, and there are two forward and four backward.
//
// A row belongs to a warp or a whole block, so that its dot product needs a shuffle or one barrier;
// what is needed after the dot product is loaded before it and waits in registers. Sums over rows
// (the gradients of b1, b2 and w3) are made in two stages of fixed order: a block sums a contiguous
// share of the rows, column by column, and mixing_sum_kernel adds the blocks' sums. A position's
// gradient is summed by one thread per 16 bytes over the position's rows in their order. No
// atomics: the same bits in every run.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arch.cuh"
#include "quietstar/mixing_head.h"
#include "reduce.cuh"

namespace quietstar::cuda {

constexpr int kTailThreads = 128;     // of a block of the tail: four rows, or one
constexpr int kElementThreads = 128;  // of the other kernels

// What a thread loads at once: 16 bytes, or one element where addresses or widths do not allow it.
template <class T>
struct One {
  static constexpr int size = 1;
  T at[1];
};
template <class T, bool kWide>
using Piece = std::conditional_t<kWide, Pack<T>, One<T>>;

template <class P, class T>
__device__ __forceinline__ P load_piece(const T* p) {
  if constexpr (P::size == 1) {
    return {{*p}};
  } else {
    return load16(p);
  }
}
template <class P, class T>
__device__ __forceinline__ void store_piece(T* p, const P& piece) {
  if constexpr (P::size == 1) {
    *p = piece.at[0];
  } else {
    store16_global(p, piece);
  }
}

// Lets a piece wait in its registers as it was loaded: left alone, the compiler unpacks it at once,
// into twice as many registers.
template <class P>
__device__ __forceinline__ void keep_packed(P& piece) {
#ifdef __CUDACC__
  if constexpr (P::size > 1) {
    auto* word = reinterpret_cast<unsigned*>(&piece);
    asm volatile("" : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3]));
  }
#else
  static_cast<void>(piece);
#endif
}

// Element e of a piece; of 16-bit numbers from the word that has two, in one instruction.
template <class P>
__device__ __forceinline__ float element(const P& piece, int e) {
  using T = std::remove_cv_t<std::remove_reference_t<decltype(piece.at[0])>>;
  if constexpr (P::size == 8) {
    unsigned pair;
    std::memcpy(&pair, &piece.at[e / 2 * 2], sizeof pair);
    return number_in<T>(pair, e % 2);
  } else {
    return to_float(piece.at[e]);
  }
}

// n numbers of fp32; the address of more than one is aligned to 16 bytes.
template <int n, bool kOnce>
__device__ __forceinline__ void load_floats(float (&to)[n], const float* p) {
  if constexpr (n == 1) {
    to[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const Pack<float> pack = kOnce ? load16_once(p + i) : load16(p + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = pack.at[j];
    }
  }
}

__device__ __forceinline__ float relu(float x) {
  return max_nan(x, 0);  // a NaN stays one
}

template <class T>
__device__ __forceinline__ T* row_of(void* p, std::int64_t r, std::int64_t width) {
  return static_cast<T*>(p) + r * width;
}
template <class T>
__device__ __forceinline__ const T* row_of(const void* p, std::int64_t r, std::int64_t width) {
  return static_cast<const T*>(p) + r * width;
}

__device__ __forceinline__ std::int64_t position_of(const MixingHead& call, std::int64_t r) {
  return call.index ? call.index[r] : r;
}

// The sum over the kGroup threads of a row; kGroup is a warp or the whole block.
template <int kGroup>
__device__ __forceinline__ float sum_of_row(float value, float* scratch) {
  if constexpr (kGroup == 32) {
    return warp_reduce(value, Sum());
  } else {
    return block_reduce<kGroup>(value, scratch, Sum());
  }
}

// Block (x, y): y rows, x threads on each.
template <class T, bool kWide>
__global__ void __launch_bounds__(kElementThreads) mixing_first_kernel(MixingHead call) {
  using P = Piece<T, kWide>;
  const std::int64_t r = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (r >= call.rows) return;
  const std::int64_t p = position_of(call, r);
  QUIETSTAR_REQUIRE(p >= 0 && p < call.positions, "base_index is out of range");
  const float* product = call.product + r * call.width;
  const float* from_base = row_of<float>(call.from_base, p, call.width);
  const T* b1 = row_of<T>(call.b1, 0, 0);
  T* h1 = row_of<T>(call.h1, r, call.width);
  for (int i = threadIdx.x * P::size; i < call.width; i += blockDim.x * P::size) {
    float left[P::size], right[P::size];
    load_floats<P::size, true>(left, product + i);
    load_floats<P::size, false>(right, from_base + i);
    const P bias = load_piece<P>(b1 + i);
    P sum;
#pragma unroll
    for (int e = 0; e < P::size; ++e) {
      sum.at[e] = from_float<T>(relu(left[e] + (right[e] + element(bias, e))));
    }
    store_piece(h1 + i, sum);
  }
}

// One row: kGroup threads. The dot product's operand is used up at once; the operands of the blend
// are loaded beside it, the first kHeld pieces of a thread into registers, the others after it.
template <class T, bool kWide, int kGroup>
__global__ void __launch_bounds__(kTailThreads, 5) mixing_tail_kernel(MixingHead call) {
  using P = Piece<T, kWide>;
  constexpr int kHeld = 4;
  QUIETSTAR_SHARED(float, scratch, [kTailThreads / 32]);
  const int lane = threadIdx.x % kGroup, pieces = static_cast<int>(call.width / P::size);
  const std::int64_t r = std::int64_t{blockIdx.x} * (kTailThreads / kGroup) + threadIdx.x / kGroup;
  if (kGroup == 32 && r >= call.rows) return;  // whole warps, and no barrier follows
  const T* h2 = row_of<T>(call.h2, r, call.width);
  const T* w3 = row_of<T>(call.w3, 0, 0);
  const T* base = row_of<T>(call.base, position_of(call, r), call.width);
  const T* thought = row_of<T>(call.thought, r, call.width);
  T* mixed = row_of<T>(call.mixed, r, call.width);

  P h[kHeld] = {}, b[kHeld] = {}, z[kHeld] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int c = lane + k * kGroup;
    if (c < pieces) {
      h[k] = load_piece<P>(h2 + c * P::size);
      z[k] = load_piece<P>(thought + c * P::size);
      b[k] = load_piece<P>(base + c * P::size);
    }
  }
  float dot = 0;
  const auto add = [&](const P& piece, int c) {
    const P w = load_piece<P>(w3 + c * P::size);
#pragma unroll
    for (int e = 0; e < P::size; ++e) {
      dot = fmaf(relu(element(piece, e)), element(w, e), dot);
    }
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (lane + k * kGroup < pieces) add(h[k], lane + k * kGroup);
  }
  for (int c = lane + kHeld * kGroup; c < pieces; c += kGroup) {
    add(load_piece<P>(h2 + c * P::size), c);
  }
  float gate = sum_of_row<kGroup>(dot, scratch);
  if (call.sigmoid) gate = 1 / (1 + expf(-gate));
  if (lane == 0) {
    call.gate[r] = gate;
    static_cast<T*>(call.w)[r] = from_float<T>(gate);
  }
  const float rest = 1 - gate;
  const auto blend = [&](const P& from_base, const P& from_thought, int c) {
    P out;
#pragma unroll
    for (int e = 0; e < P::size; ++e) {
      out.at[e] = from_float<T>(fmaf(rest, element(from_base, e), gate * element(from_thought, e)));
    }
    store_piece(mixed + c * P::size, out);
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    keep_packed(b[k]);
    keep_packed(z[k]);
    if (lane + k * kGroup < pieces) blend(b[k], z[k], lane + k * kGroup);
  }
  for (int c = lane + kHeld * kGroup; c < pieces; c += kGroup) {
    blend(load_piece<P>(base + c * P::size), load_piece<P>(thought + c * P::size), c);
  }
}

}  // namespace quietstar::cuda
