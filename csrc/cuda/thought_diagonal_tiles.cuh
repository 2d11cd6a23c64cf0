// What the kernels of thought_diagonal for bf16 and fp16 share: tiles on the matrix units.
//
// Rows of a column (query slots x heads that share a key head) are cut into tiles of 16, its slots
// into tiles of 16 keys. No operand is laid out in shared memory: a product may take its summands
// in any order and its columns in any order, so both are numbered such that every lane finds what
// it needs of a fragment in 16 consecutive bytes of a row, and writes 16 consecutive bytes of a
// result.
#pragma once

#include "reduce.cuh"
#include "thought_diagonal_rows.cuh"

namespace quietstar::cuda::diagonal {

constexpr int kTile = 16;      // rows of a tile, and keys of one
using Eight = Pack<unsigned>;  // eight 16-bit numbers

constexpr int kForwardWarps = 4;
// In the backward every warp sums 64 columns of dk or of dv.
template <int kSize>
constexpr int kBackwardWarps = kSize <= 128 ? 4 : 8;
// Blocks that a multiprocessor should hold: enough loads under way to keep the memory busy, and no
// register spilled.
constexpr int kForwardBlocks = 4;
template <int kSize>
constexpr int kBackwardBlocks = kSize <= 128 ? 3 : 1;

__device__ __forceinline__ int lane_row() {
  return static_cast<int>(threadIdx.x % 32) / 4;
}
__device__ __forceinline__ int lane_pair() {
  return static_cast<int>(threadIdx.x % 4);
}

// Elements d .. d + 7 of a row; zeros past its end (size is a multiple of 8) and for no row.
template <class T>
__device__ __forceinline__ Eight load8(const T* row, int d, int size, bool there) {
  if (there && d < size) return load16(reinterpret_cast<const unsigned*>(row + d));
  return Eight{};
}

template <class T>
__device__ __forceinline__ float2 floats(unsigned pair) {
  return {to_float(T{static_cast<std::uint16_t>(pair)}),
          to_float(T{static_cast<std::uint16_t>(pair >> 16)})};
}

// This lane's two rows of a tile: lane / 4 and lane / 4 + 8.
struct TileRows {
  DiagonalRow row[2];
};
__device__ __forceinline__ TileRows tile_rows(const ThoughtDiagonal& call, const DiagonalColumn& c,
                                              int tile) {
  const int first = tile * kTile + lane_row();
  return {{diagonal_row(call, c, first), diagonal_row(call, c, first + 8)}};
}

// Keys that any row of a tile sees.
__device__ __forceinline__ int seen_by_tile(const ThoughtDiagonal& call, const DiagonalColumn& c,
                                            int tile, int rows) {
  return diagonal_row(call, c, min(tile * kTile + kTile, rows) - 1).seen;
}

template <class T>
__device__ __forceinline__ const T* row_of(const AttentionTensor& t, const DiagonalColumn& c,
                                           const DiagonalRow& row) {
  return row_at<const T>(t, c.batch, row.head, row.slot, c.column);
}
__device__ __forceinline__ float* number_of(const AttentionTensor& t, const DiagonalColumn& c,
                                            const DiagonalRow& row) {
  return row_at<float>(t, c.batch, row.head, row.slot, c.column);
}

// x[j] += rows times keys first + 8 j .. first + 8 j + 7, transposed: in x[j][0], x[j][1] row
// lane / 4 with keys first + 8 j + 2 (lane % 4) and the next, in x[j][2], x[j][3] row lane / 4 + 8.
// Lane l stands for the elements 32 c + 8 (l % 4) .. + 7 of both operands.
template <class T, int kSize>
__device__ __forceinline__ void times_keys(float (&x)[2][4], const AttentionTensor& queries,
                                           const TileRows& rows, const AttentionTensor& keys,
                                           const DiagonalColumn& c, int first, int key_slots,
                                           int size) {
  const T* row[2] = {row_of<T>(queries, c, rows.row[0]), row_of<T>(queries, c, rows.row[1])};
  const T* key[2];
  bool there[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int t = first + 8 * j + lane_row();
    there[j] = t < key_slots;
    key[j] = row_at<const T>(keys, c.batch, c.head, there[j] ? t : 0, c.column);
  }
#pragma unroll(kSize > 64 ? 2 : 1)
  for (int d0 = 0; d0 < kSize; d0 += 32) {
    const int d = d0 + 8 * lane_pair();
    const Eight a0 = load8(row[0], d, size, rows.row[0].there);
    const Eight a1 = load8(row[1], d, size, rows.row[1].there);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Eight b = load8(key[j], d, size, there[j]);
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        mma_16x8x16<T>(x[j], {a0.at[half], a1.at[half], a0.at[half + 1], a1.at[half + 1]},
                       {b.at[half], b.at[half + 1]});
      }
    }
  }
}

// sum[j] += weights times 16 rows, of which columns d0 .. d0 + 63 are taken: in sum[j][0] row
// lane / 4, column d0 + 16 (lane % 4) + j, in sum[j][1] 8 columns further, in sum[j][2], sum[j][3]
// row lane / 4 + 8. row(i) gives the address of row i and whether it is there.
template <class T, class Row>
__device__ __forceinline__ void weigh_rows(float (&sum)[8][4], const unsigned (&weights)[4], int d0,
                                           int size, Row row) {
  const int d = d0 + 8 * lane_row();
  Eight rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bool there = false;
    const T* from = row(2 * lane_pair() + i % 2 + i / 2 * 8, there);
    rows[i] = load8(from, d, size, there);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int shift = j % 2 * 16;
    unsigned b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i] = (rows[2 * i].at[j / 2] >> shift & 0xffffu) | rows[2 * i + 1].at[j / 2] >> shift << 16;
    }
    mma_16x8x16<T>(sum[j], weights, b);
  }
}

// The tile of weights x as the left operand of the next product, rounded.
template <class T>
__device__ __forceinline__ void as_operand(unsigned (&a)[4], const float (&x)[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    a[2 * j] = pack2<T>(x[j][0], x[j][1]);
    a[2 * j + 1] = pack2<T>(x[j][2], x[j][3]);
  }
}

template <class T>
__device__ __forceinline__ auto key_rows(const AttentionTensor& keys, const DiagonalColumn& c,
                                         int first, int key_slots) {
  return [&keys, c, first, key_slots](int i, bool& there) {
    there = first + i < key_slots;
    return row_at<const T>(keys, c.batch, c.head, there ? first + i : 0, c.column);
  };
}

// Writes columns 64 part .. 64 part + 63 of two rows: sum * factor + add * weight.
template <class T>
__device__ __forceinline__ void store_rows(const AttentionTensor& to, const AttentionTensor* add,
                                           const DiagonalColumn& c, const TileRows& rows,
                                           const float (&sum)[8][4], const float (&factor)[2],
                                           const float (&weight)[2], int part, int size) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i / 2, d = 64 * part + 16 * lane_pair() + i % 2 * 8;
    const DiagonalRow& row = rows.row[r];
    if (!row.there || d >= size) continue;
    // A part of weight 0 may hold anything.
    const bool adds = add != nullptr && add->data != nullptr && weight[r] != 0;
    const Eight other = load8(adds ? row_of<T>(*add, c, row) : nullptr, d, size, adds);
    Eight result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 text = floats<T>(other.at[j]);
      result.at[j] = pack2<T>(sum[2 * j][i] * factor[r] + text.x * weight[r],
                              sum[2 * j + 1][i] * factor[r] + text.y * weight[r]);
    }
    T* at = row_at<T>(to, c.batch, row.head, row.slot, c.column) + d;
    store16_global(reinterpret_cast<unsigned*>(at), result);
  }
}

}  // namespace quietstar::cuda::diagonal
