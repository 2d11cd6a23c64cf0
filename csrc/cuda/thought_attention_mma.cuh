// Products of 16 x 16 x 16 out of shared tiles (see in_tile), for 16-bit elements by mma.m16n8k16
// and for fp32 by mma.m16n8k8 of tf32. Only this file knows how fragments lie in registers.
//
// A 16 x 16 block of results is float[2][4]: columns 0 .. 7 and 8 .. 15. With g = lane / 4 and
// t = lane % 4, a thread holds of each half, in this order, row g columns 2t and 2t + 1, then the
// same of row g + 8.
//
// In fp32, tf32 has 11 bits of an operand. Where they are not enough (`precise`), an operand is
// split into a tf32 number and the rest, and three products are taken. The unit cuts off the bits
// of its sums instead of rounding them, so each product starts from 0 and is added outside of it.
#pragma once

#include "thought_attention_tiles.cuh"

namespace quietstar::cuda::attention {

// Left operand, 16 rows x 16 of the sum; right operand, 16 of the sum x 16 columns.
template <class T>
struct Left {
  unsigned r[4];
};
template <class T>
struct Right {
  unsigned r[4];
};
template <>
struct Left<float> {
  float r[2][4];
};
template <>
struct Right<float> {
  float r[2][2][2];  // [columns 0 .. 7, 8 .. 15][first, second half of the sum][b]
};

// Rows `row` .. + 15 and columns `column` .. + 15 of a tile as left operand; of rows and columns
// that are multiples of 16, here and below.
template <int kSize, class T>
__device__ __forceinline__ Left<T> left_of_tile(T* tile, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Left<T> left;
  if constexpr (std::is_same_v<T, float>) {
    // The sum may run in any order: columns 2t and 2t + 1 stand for t and t + 4, here and in Right.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const auto two = *reinterpret_cast<const float2*>(in_tile_beside<T, kSize>(
            tile, lane / 4 + low * 8, half * 8 + lane % 4 * 2, row, column));
        left.r[half][low] = two.x;
        left.r[half][2 + low] = two.y;
      }
    }
  } else {
    load_matrices(left.r, in_tile_beside<T, kSize>(tile, lane % 16, lane / 16 * 8, row, column));
  }
  return left;
}

// Right operand whose columns are rows of a tile: the tile's rows `row` .. + 15, of which columns
// `column` .. + 15 are summed over.
template <int kSize, class T>
__device__ __forceinline__ Right<T> right_of_rows(T* tile, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Right<T> right;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto two = *reinterpret_cast<const float2*>(
            in_tile_beside<T, kSize>(tile, n * 8 + lane / 4, half * 8 + lane % 4 * 2, row, column));
        right.r[n][half][0] = two.x;
        right.r[n][half][1] = two.y;
      }
    }
  } else {
    load_matrices(right.r, in_tile_beside<T, kSize>(tile, lane / 16 * 8 + lane % 8,
                                                    lane / 8 % 2 * 8, row, column));
  }
  return right;
}

// Right operand as it lies: rows `row` .. + 15 of a tile are summed over, columns are columns.
template <int kSize, class T>
__device__ __forceinline__ Right<T> right_of_columns(T* tile, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Right<T> right;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          right.r[n][half][i] = *in_tile_beside<T, kSize>(tile, half * 8 + lane % 4 * 2 + i,
                                                          n * 8 + lane / 4, row, column);
        }
      }
    }
  } else {
    load_matrices_t(right.r, in_tile_beside<T, kSize>(tile, lane % 16, lane / 16 * 8, row, column));
  }
  return right;
}

// Results of one product as the left operand of the next.
template <class T>
__device__ __forceinline__ Left<T> left_of_results(const float (&d)[2][4]) {
  Left<T> left;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      left.r[half][0] = d[half][0];
      left.r[half][1] = d[half][2];
      left.r[half][2] = d[half][1];
      left.r[half][3] = d[half][3];
    }
  } else {
    left.r[0] = pack2<T>(d[0][0], d[0][1]);
    left.r[1] = pack2<T>(d[0][2], d[0][3]);
    left.r[2] = pack2<T>(d[1][0], d[1][1]);
    left.r[3] = pack2<T>(d[1][2], d[1][3]);
  }
  return left;
}

// d += left right
template <class T>
__device__ __forceinline__ void multiply(float (&d)[2][4], const Left<T>& left,
                                         const Right<T>& right, bool) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const unsigned b[2] = {right.r[2 * n], right.r[2 * n + 1]};
    mma_16x8x16<T>(d[n], left.r, b);
  }
}

template <>
__device__ __forceinline__ void multiply<float>(float (&d)[2][4], const Left<float>& left,
                                                const Right<float>& right, bool precise) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned a[4], a_rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = to_tf32(left.r[half][i]);
      a_rest[i] = to_tf32(left.r[half][i] - __uint_as_float(a[i]));
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      unsigned b[2], b_rest[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[i] = to_tf32(right.r[n][half][i]);
        b_rest[i] = to_tf32(right.r[n][half][i] - __uint_as_float(b[i]));
      }
      if (precise) {
        float sum[4] = {0, 0, 0, 0};
        mma_16x8x8_tf32(sum, a_rest, b);
        mma_16x8x8_tf32(sum, a, b_rest);
        mma_16x8x8_tf32(sum, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) d[n][i] += sum[i];
      } else {
        mma_16x8x8_tf32(d[n], a, b);
      }
    }
  }
}

// Bit i is set where some of keys 16 i .. 16 i + 15 of a tile are seen.
template <int kKeyTiles>
__device__ __forceinline__ unsigned groups_seen(const Span& span, const KeyTile& keys) {
  unsigned seen = 0;
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
    seen |= (span.meets(keys.begin + 16 * i, keys.begin + 16 * i + 16) ? 1u : 0u) << i;
  }
  return seen;
}

// d = rows keys^T, both tiles of kSize columns; with kEdge for the groups of keys in `seen` only,
// and 0 for the others.
template <int kSize, bool kEdge, class T, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void multiply_rows(float (&d)[kRowTiles][kKeyTiles][2][4], T* rows,
                                              T* keys, unsigned seen, bool precise) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kKeyTiles * 8; ++j) d[r][j / 8][j / 4 % 2][j % 4] = 0;
  }
  // As far as the registers go that sums and scores leave.
  constexpr bool kOneTile = kRowTiles == 1 && kSize <= 128;
  constexpr int kUnroll = kOneTile && kSize > 64 ? kSize / 16 : kOneTile || kKeyTiles > 2 ? 2 : 4;
#pragma unroll kUnroll
  for (int c = 0; c < kSize; c += 16) {
    Left<T> left[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) left[r] = left_of_tile<kSize>(rows, r * 16, c);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      if (kEdge && !(seen >> j & 1)) continue;
      const Right<T> right = right_of_rows<kSize>(keys, j * 16, c);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) multiply(d[r][j], left[r], right, precise);
    }
  }
}

// sums += weights values
template <int kSize, bool kEdge, class T, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void add_weighted(float (&sums)[kRowTiles][kSize / 16][2][4],
                                             const float (&weights)[kRowTiles][kKeyTiles][2][4],
                                             T* values, unsigned seen, bool precise) {
#pragma unroll
  for (int j = 0; j < kKeyTiles; ++j) {
    if (kEdge && !(seen >> j & 1)) continue;
    Left<T> left[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) left[r] = left_of_results<T>(weights[r][j]);
#pragma unroll
    for (int n = 0; n < kSize / 16; ++n) {
      const Right<T> right = right_of_columns<kSize>(values, j * 16, n * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) multiply(sums[r][n], left[r], right, precise);
    }
  }
}

}  // namespace quietstar::cuda::attention
