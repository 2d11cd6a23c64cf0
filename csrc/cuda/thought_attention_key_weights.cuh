// What rows give to 16 keys of a warp: p and ds (see thought_attention_row_gradients.cuh), as keys
// x rows, so that they are left operands of the products with dout and q. For the kernels of the
// gradients of keys and values.
#pragma once

#include "thought_attention_mma.cuh"

namespace quietstar::cuda::attention {

// What the kernels have to know of rows, in shared memory: [4][kRows], a number per row each.
template <int kRows>
struct RowConstants {
  const int* at;

  __device__ __forceinline__ Range range(int row) const { return {at[row], at[kRows + row]}; }
  // To the base of 2.
  __device__ __forceinline__ const float* lse() const {
    return reinterpret_cast<const float*>(at + 2 * kRows);
  }
  __device__ __forceinline__ const float* delta() const { return lse() + kRows; }
};

// Of kGroups * 16 rows; without kOfKeys only p is wanted.
template <class T, int kSize, int kGroups, bool kOfKeys = true>
struct KeyWeights {
  // Under a cap, ds needs the tanh once more. In 16 bits it is exact enough to find it from its
  // weight, and no register holds it all the while.
  static constexpr bool kHoldScores = kOfKeys && sizeof(T) == 4;
  float scores[1][kHoldScores ? kGroups : 1][2][4];
  float p[1][kGroups][2][4], ds[1][kGroups][2][4];

  // The row of result j of a lane.
  static __device__ __forceinline__ int row_of_result(int j) {
    return j / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + j % 2;
  }

  // p, of keys that the rows may not see as well.
  template <int kRows>
  __device__ __forceinline__ void weigh(const Arguments& a, T* k, T* q,
                                        const RowConstants<kRows>& rows) {
    multiply_rows<kSize, false>(p, k, q, 0, a.precise);
    if (a.scores != Scores::plain) {  // asked once, not of every score
#pragma unroll
      for (int j = 0; j < kGroups * 8; ++j) {
        float& x = p[0][j / 8][j / 4 % 2][j % 4];
        x = score_of<T>(a, x);
        if (kHoldScores) scores[0][j / 8][j / 4 % 2][j % 4] = x;
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      float& here = p[0][j / 8][j / 4 % 2][j % 4];
      here = exp2_of<T>(here * a.outer - rows.lse()[row_of_result(j)]);
    }
  }

  // p = 0 where a row does not see a key; the first key has the number `key`.
  template <int kRows>
  __device__ __forceinline__ void mask(const RowConstants<kRows>& rows, int key) {
    const int first = key + static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      const Range seen = rows.range(row_of_result(j));
      const int mine = first + j / 2 % 2 * 8;
      if (mine < seen.first || mine >= seen.last) p[0][j / 8][j / 4 % 2][j % 4] = 0;
    }
  }

  template <int kRows>
  __device__ __forceinline__ void differentiate(const Arguments& a, T* v, T* dout,
                                                const RowConstants<kRows>& rows) {
    multiply_rows<kSize, false>(ds, v, dout, 0, a.precise);
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      float& here = ds[0][j / 8][j / 4 % 2][j % 4];
      here = p[0][j / 8][j / 4 % 2][j % 4] * (here - rows.delta()[row_of_result(j)]);
    }
    if (a.scores == Scores::capped) {
#pragma unroll
      for (int j = 0; j < kGroups * 8; ++j) {
        const float x =
            kHoldScores
                ? scores[0][j / 8 % (kHoldScores ? kGroups : 1)][j / 4 % 2][j % 4]
                : (log2f(p[0][j / 8][j / 4 % 2][j % 4]) + rows.lse()[row_of_result(j)]) / a.outer;
        ds[0][j / 8][j / 4 % 2][j % 4] *= 1 - x * x;
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      // Of a masked key dout.v may be anything, and a weight of 0 has no logarithm.
      if (p[0][j / 8][j / 4 % 2][j % 4] == 0) ds[0][j / 8][j / 4 % 2][j % 4] = 0;
    }
  }
};

}  // namespace quietstar::cuda::attention
