// The backward pass of the mixing head around its matrix products: kernels that go over rows once,
// and the sums over rows that they make on the way. See mixing_head.cuh.
#pragma once

#include "mixing_head.cuh"

namespace quietstar::cuda {

// Of a block of the tail's backward pass: eight rows at a time, or one.
constexpr int kBackwardThreads = 256;
constexpr int kSumWarps = 8;

// n numbers of fp32; the address of more than one is aligned to 16 bytes.
template <int n>
__device__ __forceinline__ void store_floats(float* p, const float (&from)[n]) {
  if constexpr (n == 1) {
    *p = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      store16_global(p + i, Pack<float>{{from[i], from[i + 1], from[i + 2], from[i + 3]}});
    }
  }
}

// Column sums in shared memory. Four columns lie together, and the second four of every piece
// behind the first four of all of them: neighbouring threads meet neighbouring 16 bytes.
template <int n>
__device__ __forceinline__ void add_to_columns(float* sums, int pieces, int piece,
                                               const float (&values)[n]) {
  if constexpr (n == 1) {
    sums[piece] += values[0];
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      float* const four = sums + (i / 4 * pieces + piece) * 4;
      Pack<float> sum = load16(four);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.at[j] += values[i + j];
      store16(four, sum);
    }
  }
}
// The column whose sum is at place i, for pieces of n columns.
__device__ __forceinline__ int column_of(int i, int pieces, int n) {
  if (n == 1) return i;
  const int plane = i / (4 * pieces), rest = i % (4 * pieces);
  return rest / 4 * n + plane * 4 + rest % 4;
}

// A block works on its share of the rows, kGroup threads a row, and sums the gradients of b2 and w3
// over them: per group in shared memory [2, width], where every column has one thread, then over
// the groups into workspace [block, 2, width], columns in the order of add_to_columns.
template <class T, bool kWide, int kGroup>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    mixing_tail_backward_kernel(MixingHead call, std::int64_t rows_per_block) {
  using P = Piece<T, kWide>;
  constexpr int kHeld = 2, kGroups = kBackwardThreads / kGroup;
  QUIETSTAR_SHARED(float, scratch, [2][kBackwardThreads / 32]);
  QUIETSTAR_DYNAMIC_SHARED(memory);
  float* const sums = reinterpret_cast<float*>(memory);
  const int width = static_cast<int>(call.width), pieces = width / P::size;
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
  float* const sum_b2 = sums + group * 2 * width;
  float* const sum_w3 = sum_b2 + width;
  for (int i = lane; i < 2 * width; i += kGroup) sum_b2[i] = 0;
  __syncthreads();

  const T* w3 = row_of<T>(call.w3, 0, 0);
  const std::int64_t begin = blockIdx.x * rows_per_block;
  const std::int64_t end = min(begin + rows_per_block, call.rows);
  int turn = 0;
  for (std::int64_t r = begin + group; r < end; r += kGroups) {
    const T* grad_mixed = row_of<T>(call.grad_mixed, r, width);
    const T* base = row_of<T>(call.base, position_of(call, r), width);
    const T* thought = row_of<T>(call.thought, r, width);
    const T* h2 = row_of<T>(call.h2, r, width);
    T* grad_thought = row_of<T>(call.grad_thought, r, width);
    T* grad_h2 = row_of<T>(call.grad_h2, r, width);
    const float gate = call.gate[r];
    float dot = 0;
    const auto pass_on = [&](const P& g, const P& b, const P& z, int c) {
      P out;
#pragma unroll
      for (int e = 0; e < P::size; ++e) {
        const float value = element(g, e);
        dot = fmaf(value, element(z, e) - element(b, e), dot);
        out.at[e] = from_float<T>(gate * value);
      }
      store_piece(grad_thought + c * P::size, out);
    };
    P g[kHeld] = {}, b[kHeld] = {}, z[kHeld] = {}, h[kHeld] = {};
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int c = lane + k * kGroup;
      if (c < pieces) {
        g[k] = load_piece<P>(grad_mixed + c * P::size);
        z[k] = load_piece<P>(thought + c * P::size);
        b[k] = load_piece<P>(base + c * P::size);
        h[k] = load_piece<P>(h2 + c * P::size);
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      keep_packed(g[k]);
      keep_packed(b[k]);
      keep_packed(z[k]);
      if (lane + k * kGroup < pieces) pass_on(g[k], b[k], z[k], lane + k * kGroup);
    }
    for (int c = lane + kHeld * kGroup; c < pieces; c += kGroup) {
      pass_on(load_piece<P>(grad_mixed + c * P::size), load_piece<P>(base + c * P::size),
              load_piece<P>(thought + c * P::size), c);
    }
    // Two scratch rows in turn: the next barrier frees the one before.
    float outer = call.grad_gate[r] + sum_of_row<kGroup>(dot, scratch[turn]);
    turn ^= 1;
    if (call.sigmoid) outer *= gate * (1 - gate);

    const auto into_h2 = [&](const P& hidden, int c) {
      const P weight = load_piece<P>(w3 + c * P::size);
      P out;
      float of_b2[P::size], of_w3[P::size];
#pragma unroll
      for (int e = 0; e < P::size; ++e) {
        const float x = element(hidden, e);
        of_b2[e] = x <= 0 ? 0 : outer * element(weight, e);
        of_w3[e] = outer * relu(x);
        out.at[e] = from_float<T>(of_b2[e]);
      }
      store_piece(grad_h2 + c * P::size, out);
      add_to_columns(sum_b2, pieces, c, of_b2);
      add_to_columns(sum_w3, pieces, c, of_w3);
    };
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      keep_packed(h[k]);
      if (lane + k * kGroup < pieces) into_h2(h[k], lane + k * kGroup);
    }
    for (int c = lane + kHeld * kGroup; c < pieces; c += kGroup) {
      into_h2(load_piece<P>(h2 + c * P::size), c);
    }
  }

  __syncthreads();
  float* to = call.workspace + blockIdx.x * std::int64_t{2} * width;
  for (int i = threadIdx.x; i < 2 * width; i += kBackwardThreads) {
    float sum = sums[i];
#pragma unroll
    for (int other = 1; other < kGroups; ++other) sum += sums[other * 2 * width + i];
    to[i] = sum;
  }
}

// Block (x, y) of grid (columns, shares): x threads on the columns, y shares of the positions. The
// thread of a piece goes over the positions of its share, and over each one's rows, kBatch loads of
// every operand at a time. Writes the share's sum of grad_from_base to workspace [share, width].
template <class T, bool kWide>
__global__ void __launch_bounds__(kElementThreads, 3)
    mixing_first_backward_kernel(MixingHead call, std::int64_t positions_per_share) {
  using P = Piece<T, kWide>;
  constexpr int kBatch = 4;
  const std::int64_t width = call.width;
  const std::int64_t i = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * P::size;
  const std::int64_t share = std::int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  const std::int64_t begin = share * positions_per_share;
  const std::int64_t end = min(begin + positions_per_share, call.positions);
  if (i >= width || begin >= end) return;
  T* grad_h1 = static_cast<T*>(call.grad_h1);
  const T* h1 = static_cast<const T*>(call.h1);
  const T* grad_mixed = static_cast<const T*>(call.grad_mixed);
  float of_b1[P::size] = {};
  for (std::int64_t p = begin; p < end; ++p) {
    const std::int64_t first = call.first ? call.first[p] : p;
    const std::int64_t last = call.first ? call.first[p + 1] : p + 1;
    float of_product[P::size] = {}, of_base[P::size] = {};
#pragma unroll 1
    for (std::int64_t k = first; k < last; k += kBatch) {
      P g[kBatch] = {}, h[kBatch] = {}, m[kBatch] = {};
      std::int64_t at[kBatch] = {};
      float rest[kBatch] = {};
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (k + n < last) {
          const std::int64_t r = call.order ? call.order[k + n] : k + n;
          at[n] = r * width + i;
          g[n] = load_piece<P>(grad_h1 + at[n]);
          h[n] = load_piece<P>(h1 + at[n]);
          m[n] = load_piece<P>(grad_mixed + at[n]);
          rest[n] = 1 - call.gate[r];
        }
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        keep_packed(g[n]);
        keep_packed(h[n]);
        keep_packed(m[n]);
        if (k + n < last) {
#pragma unroll
          for (int e = 0; e < P::size; ++e) {
            const T zero = from_float<T>(0.0f);
            g[n].at[e] = element(h[n], e) <= 0 ? zero : g[n].at[e];
            of_product[e] += element(g[n], e);
            of_base[e] = fmaf(rest[n], element(m[n], e), of_base[e]);
          }
          store_piece(grad_h1 + at[n], g[n]);
        }
      }
    }
    P rounded, base;
#pragma unroll
    for (int e = 0; e < P::size; ++e) {
      of_b1[e] += of_product[e];
      rounded.at[e] = from_float<T>(of_product[e]);
      base.at[e] = from_float<T>(of_base[e]);
    }
    store_piece(row_of<T>(call.grad_from_base, p, width) + i, rounded);
    store_piece(row_of<T>(call.grad_base, p, width) + i, base);
  }
  store_floats(call.workspace + share * width + i, of_b1);
}

// Sums partial [parts, columns] over the parts; a block has 32 columns, and a warp of it every
// kSumWarps-th part. The first width columns go to out, the others to second; in both, pieces of n
// columns are in the order of add_to_columns.
template <class T>
__global__ void __launch_bounds__(32 * kSumWarps)
    mixing_sum_kernel(const float* partial, int parts, int columns, int width, int n, T* out,
                      T* second) {
  QUIETSTAR_SHARED(float, sums, [kSumWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int i = blockIdx.x * 32 + lane;
  float sum = 0;
  if (i < columns) {
#pragma unroll 8
    for (int part = warp; part < parts; part += kSumWarps) {
      sum += partial[std::int64_t{part} * columns + i];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && i < columns) {
#pragma unroll
    for (int other = 1; other < kSumWarps; ++other) sum += sums[other][lane];
    T* const to = i < width ? out : second;
    to[column_of(i % width, width / n, n)] = from_float<T>(sum);
  }
}

}  // namespace quietstar::cuda
