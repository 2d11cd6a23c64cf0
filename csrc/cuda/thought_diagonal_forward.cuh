// thought_diagonal forward for bf16 and fp16.
#pragma once

#include "thought_diagonal_tiles.cuh"

namespace quietstar::cuda::diagonal {

// x = scores of a tile of rows with 16 keys in units of log2, -inf where a row does not see a key.
template <class T, int kSize>
__device__ __forceinline__ void scores_of(float (&x)[2][4], const ThoughtDiagonal& call,
                                          const DiagonalColumn& c, const TileRows& rows,
                                          int first) {
  const float scale = static_cast<float>(call.scale) * kLog2e;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = 0;
  }
  times_keys<T, kSize>(x, call.q, rows, call.k_thought, c, first, static_cast<int>(call.key_slots),
                       static_cast<int>(call.head_size));
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + 8 * j + 2 * lane_pair() + i % 2;
      x[j][i] = key < rows.row[i / 2].seen ? x[j][i] * scale : -INFINITY;
    }
  }
}

// A warp per tile of rows: first their sums, then their outputs, 64 columns at a time. Where all
// keys fit one tile the scores are computed once, otherwise again for each of these passes: that is
// little beside the registers that all columns at once would take.
template <class T, int kSize>
__global__ void __launch_bounds__(32 * kForwardWarps, kForwardBlocks)
    diagonal_forward(ThoughtDiagonal call, unsigned tiles, unsigned tasks) {
  const unsigned task = blockIdx.x * kForwardWarps + threadIdx.x / 32;
  if (task >= tasks) return;
  const DiagonalColumn c = diagonal_column(call, task / tiles);
  const int tile = static_cast<int>(task % tiles);
  const TileRows rows = tile_rows(call, c, tile);
  const int size = static_cast<int>(call.head_size);
  const int count = static_cast<int>(call.q_heads / call.kv_heads * call.query_slots);
  const int seen = seen_by_tile(call, c, tile, count);
  float x[2][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  for (int first = 0; first < seen; first += kTile) {
    scores_of<T, kSize>(x, call, c, rows, first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_max = top[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) row_max = fmaxf(row_max, x[i / 2][2 * r + i % 2]);
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 2));
      // Where nothing was seen yet, any finite shift turns the weights into 0.
      const float shift = row_max == -INFINITY ? 0 : row_max;
      float added = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) added += fast_exp2(x[i / 2][2 * r + i % 2] - shift);
      added += __shfl_xor_sync(kAllLanes, added, 1);
      added += __shfl_xor_sync(kAllLanes, added, 2);
      total[r] = total[r] * fast_exp2(top[r] - shift) + added;
      top[r] = row_max;
    }
  }

  const bool text = call.text_out.data != nullptr;
  float factor[2], weight[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const DiagonalRow& row = rows.row[r];
    const MergedRow merged = merge_row<T>(
        top[r], total[r], text && row.there ? *number_of(call.text_lse, c, row) : -INFINITY,
        call.sinks ? call.sinks[row.head] : -INFINITY);
    factor[r] = merged.slots;
    weight[r] = merged.text;
    if (row.there && lane_pair() == 0) *number_of(call.lse, c, row) = merged.lse;
    if (top[r] == -INFINITY) top[r] = 0;
  }

  const bool one_tile = seen <= kTile;
#pragma unroll 1
  for (int part = 0; part < kSize / 64; ++part) {
    float sum[8][4] = {};
    for (int first = 0; first < seen; first += kTile) {
      if (!one_tile) scores_of<T, kSize>(x, call, c, rows, first);
      float p[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) p[i / 4][i % 4] = fast_exp2(x[i / 4][i % 4] - top[i / 2 % 2]);
      unsigned weights[4];
      as_operand<T>(weights, p);
      weigh_rows<T>(sum, weights, 64 * part, size,
                    key_rows<T>(call.v_thought, c, first, static_cast<int>(call.key_slots)));
    }
    store_rows<T>(call.out, &call.text_out, c, rows, sum, factor, weight, part, size);
  }
}

}  // namespace quietstar::cuda::diagonal
