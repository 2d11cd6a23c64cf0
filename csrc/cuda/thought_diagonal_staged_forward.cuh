// thought_diagonal forward for bf16 and fp16 by way of shared memory.
#pragma once

#include "thought_diagonal_staged.cuh"

namespace quietstar::cuda::diagonal {

template <int kSize>
constexpr std::size_t staged_forward_bytes(int warps) {
  return sizeof(BFloat16) * kSize * kTile * static_cast<std::size_t>(2 + 2 * warps);
}
template <int kSize>
constexpr int kStagedForwardBlocks = kSize <= 64 ? 6 : 5;

// Shared memory: keys, values; of each warp q and the text part, which turns into out.
template <class T, int kSize>
__global__ void __launch_bounds__(32 * kStagedWarps, kStagedForwardBlocks<kSize>)
    diagonal_forward_staged(ThoughtDiagonal call, Staging s) {
  QUIETSTAR_DYNAMIC_SHARED(memory);
  constexpr int kElements = kTile * kSize;
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  T* k = reinterpret_cast<T*>(memory);
  T *v = k + kElements, *q = k + (2 + 2 * warp) * kElements, *text = q + kElements;
  const DiagonalColumn c = s.column();
  const int size = static_cast<int>(call.head_size);
  const int key_slots = static_cast<int>(call.key_slots);
  const Mover<kSize> mover;
  const bool in_row = mover.d < size;
  stage_keys<T, kSize>(k, call.k_thought, c, key_slots, size);
  stage_keys<T, kSize>(v, call.v_thought, c, key_slots, size);

  for (int first = warp * kTile;; first += warps * kTile) {
    const StagedRows<const T> from_q(call.q, s, c, in_row ? mover.d : 0);
    const StagedRows<const T> from_text(call.text_out, s, c, in_row ? mover.d : 0);
#pragma unroll
    for (int i = 0; i < mover.kSteps; ++i) {
      const StagedRow row = staged_row(s, first + mover.row + i * mover.kRows);
      const bool there = in_row && row.there;
      copy16_async(mover.in(q, i), from_q.at(row), there);
      copy16_async(mover.in(text, i), from_text.at(row), there && s.has_text);
    }
    commit_copies();
    float text_lse[2], sink[2];
    StagedRow mine[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[r] = staged_row(s, first + lane_row() + 8 * r);
      const StagedRows<const float> lse(call.text_lse, s, c);
      text_lse[r] = s.has_text && mine[r].there ? *lse.at(mine[r]) : -INFINITY;
      const int head = c.head * static_cast<int>(s.groups) + static_cast<int>(mine[r].group);
      sink[r] = call.sinks ? call.sinks[head] : -INFINITY;
    }
    wait_for_copies<0>();
    if (first == warp * kTile) {
      __syncthreads();  // all warps have fetched keys and values
    } else {
      __syncwarp();
    }

    float x[1][1][2][4], factor[2], weight[2];
    multiply_rows<kSize, false>(x, q, k, 0, false);
    const float scale = static_cast<float>(call.scale) * kLog2e;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int seen = mine[r].there ? static_cast<int>(mine[r].slot) + 1 + key_slots -
                                           static_cast<int>(call.query_slots)
                                     : 0;
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& here = x[0][0][i / 2][2 * r + i % 2];
        here =
            i / 2 * 8 + 2 * lane_pair() + i % 2 < min(seen, key_slots) ? here * scale : -INFINITY;
        top = fmaxf(top, here);
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      // Where nothing was seen, any finite shift turns the weights into 0.
      const float shift = top == -INFINITY ? 0 : top;
      float total = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& here = x[0][0][i / 2][2 * r + i % 2];
        here = fast_exp2(here - shift);
        total += here;
      }
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const MergedRow merged = merge_row<T>(top, total, text_lse[r], sink[r]);
      factor[r] = merged.slots;
      weight[r] = merged.text;
      const StagedRows<float> lse(call.lse, s, c);
      if (mine[r].there && lane_pair() == 0) *lse.at(mine[r]) = merged.lse;
    }
    const Left<T> weights = left_of_results<T>(x[0][0]);
#pragma unroll
    for (int n = 0; n < kSize; n += 16) {
      float sum[2][4] = {};
      multiply(sum, weights, right_of_columns<kSize>(v, 0, n), false);
      add_sums<T, kSize>(text, lane_row(), n, sum, factor, weight);
    }
    __syncwarp();
    unstage_rows<T, kSize>(call.out, s, c, first, text, size);
    if (first + (warps - warp) * kTile >= s.rows) return;
    __syncwarp();  // the tile has been read
  }
}

}  // namespace quietstar::cuda::diagonal
