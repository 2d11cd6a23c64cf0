// thought_diagonal for bf16 and fp16 by way of shared memory: where the slots of a column fit one
// tile of 16 keys and heads are at most 128 wide, as in training.
//
// A block takes a column and key head, a warp 16 of its rows at a time. Everything that a block
// reads of q, keys, values, the text part, out and dout is under way at once, in copies of 16 bytes
// that need no register, and is read once; the products find their operands in shared memory, and
// results leave through it, 16 bytes at a time. Rows past the end and columns past the size of a
// head are zeros there.
#pragma once

#include "thought_attention_mma.cuh"
#include "thought_diagonal_tiles.cuh"

namespace quietstar::cuda::diagonal {

using attention::Divider;
using attention::element;
using attention::in_tile;
using attention::in_tile_beside;
using attention::Left;
using attention::left_of_results;
using attention::left_of_tile;
using attention::multiply;
using attention::multiply_rows;
using attention::Right;
using attention::right_of_columns;
using attention::right_of_rows;

constexpr int kStagedWarps = 4;  // of a block at most; fewer where a column has fewer rows

// What the launcher knows of the blocks and of a column's rows. A row is divided by the heads that
// share its key head in 32 bits: as long as (rows + 64) times them is below 2^16.
struct Staging {
  Divider by_heads, by_columns;
  int rows;  // of a column under a key head
  unsigned groups, magic;
  bool has_text;  // otherwise the tensor of the text part is another one, which is not read

  __device__ __forceinline__ DiagonalColumn column() const {
    const unsigned pair = by_heads.divide(blockIdx.x), batch = by_columns.divide(pair);
    return {static_cast<int>(batch), static_cast<int>(blockIdx.x - pair * by_heads.divisor),
            static_cast<int>(pair - batch * by_columns.divisor)};
  }
};

struct StagedRow {
  bool there;
  unsigned slot, group;
};
__device__ __forceinline__ StagedRow staged_row(const Staging& s, int number) {
  const auto n = static_cast<unsigned>(number), slot = n * s.magic >> 16;
  return {number < s.rows, slot, n - slot * s.groups};
}

// Rows of a column in a tensor like q, less than 2^32 bytes apart, which the launcher has looked
// at.
template <class T>
struct StagedRows {
  T* first;
  unsigned slot, head;  // bytes

  __device__ __forceinline__ StagedRows(const AttentionTensor& t, const Staging& s,
                                        const DiagonalColumn& c, int d = 0)
      : first(element<T>(t, c.batch, c.head * static_cast<int>(s.groups), 0, c.column) + d),
        slot(static_cast<unsigned>(t.slot) * sizeof(T)),
        head(static_cast<unsigned>(t.head) * sizeof(T)) {}
  __device__ __forceinline__ T* at(const StagedRow& row) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) +
                                (row.slot * slot + row.group * head));
  }
};

// A lane's part in moving 16 rows of kSize elements, some rows at once: row and element of the
// first of its kSteps pieces; the others are kRows rows further on each.
template <int kSize>
struct Mover {
  static constexpr int kChunks = kSize / 8, kRows = 32 / kChunks, kSteps = kTile / kRows;
  int row = static_cast<int>(threadIdx.x % 32 / kChunks);
  int d = static_cast<int>(threadIdx.x % kChunks * 8);

  // Piece i of a tile. A row below kRows and a multiple of it add up without a carry.
  template <class T>
  __device__ __forceinline__ T* in(T* tile, int i) const {
    const int swap = (i * kRows) & 7;
    return tile + (row + i * kRows) * kSize + ((d / 8 ^ row ^ swap) * 8);
  }
};

// Keys or values of a column, by all warps of the block.
template <class T, int kSize>
__device__ __forceinline__ void stage_keys(T* tile, const AttentionTensor& from,
                                           const DiagonalColumn& c, int key_slots, int size) {
  const Mover<kSize> mover;
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const bool in_row = mover.d < size;
  const T* first = element<const T>(from, c.batch, c.head, 0, c.column) + (in_row ? mover.d : 0);
#pragma unroll 2
  for (int r = warp * mover.kRows + mover.row; r < kTile; r += warps * mover.kRows) {
    copy16_async(in_tile<T, kSize>(tile, r, mover.d),
                 first + static_cast<unsigned>(r) * static_cast<unsigned>(from.slot),
                 in_row && r < key_slots);
  }
}

// Pieces of 16 bytes of a warp's tile to memory.
template <class T, int kSize>
__device__ __forceinline__ void unstage_rows(const AttentionTensor& to, const Staging& s,
                                             const DiagonalColumn& c, int first, T* tile,
                                             int size) {
  const Mover<kSize> mover;
  if (mover.d >= size) return;
  const StagedRows<T> rows(to, s, c, mover.d);
#pragma unroll
  for (int i = 0; i < mover.kSteps; ++i) {
    const StagedRow row = staged_row(s, first + mover.row + i * mover.kRows);
    if (row.there) store16_global(rows.at(row), load16(mover.in(tile, i)));
  }
}

// Columns n to n + 15 of a tile become factor times the sums of a product + weight times
// themselves, or the former alone where the weight is 0: then they may hold anything. A lane has
// the rows `row` and `row` + 8, with a factor and a weight each.
template <class T, int kSize>
__device__ __forceinline__ void add_sums(T* tile, int row, int n, const float (&sum)[2][4],
                                         const float (&factor)[2], const float (&weight)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i % 2, half = i / 2;
    auto* word = reinterpret_cast<unsigned*>(
        in_tile_beside<T, kSize>(tile, row + 8 * r, 8 * half + 2 * lane_pair(), 0, n));
    const float2 two = floats<T>(weight[r] == 0 ? 0u : *word);
    *word = pack2<T>(sum[half][2 * r] * factor[r] + two.x * weight[r],
                     sum[half][2 * r + 1] * factor[r] + two.y * weight[r]);
  }
}

}  // namespace quietstar::cuda::diagonal
