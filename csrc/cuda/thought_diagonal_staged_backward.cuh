// thought_diagonal backward for bf16 and fp16 by way of shared memory.
#pragma once

#include "thought_diagonal_staged.cuh"

namespace quietstar::cuda::diagonal {

template <int kSize>
constexpr std::size_t staged_backward_bytes(int warps) {
  return sizeof(BFloat16) * kTile * static_cast<std::size_t>(kSize * (2 + 3 * warps) + 32 * warps);
}
template <int kSize>
constexpr int kStagedBackwardBlocks = kSize <= 64 ? 4 : 3;

// The sums over rows for a quarter of dk and dv together: half of the columns of one of them.
template <int kSize>
using KeySums = float[kSize / 32][2][4];

// Shared memory: keys, values; q, dout and `own` of each warp one behind the other, then the
// weights. own is a warp's alone: first out, then the text part of dq, which turns into dq.
// dk and dv sum over all rows of the column: warps leave the weights of their rows in shared
// memory, and then each sums a quarter.
template <class T, int kSize>
__global__ void __launch_bounds__(32 * kStagedWarps, kStagedBackwardBlocks<kSize>)
    diagonal_backward_staged(ThoughtDiagonalBackward back, Staging s) {
  QUIETSTAR_DYNAMIC_SHARED(memory);
  constexpr int kElements = kTile * kSize, kHalf = kSize / 2;
  const ThoughtDiagonal& call = back.forward;
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  T* k = reinterpret_cast<T*>(memory);
  T *v = k + kElements, *q = v + kElements, *dout = q + warps * kElements;
  T* own = dout + (warps + warp) * kElements;
  T* weights = dout + 2 * warps * kElements;  // [rows][p of 16 keys, ds of 16 keys]
  const DiagonalColumn c = s.column();
  const int size = static_cast<int>(call.head_size);
  const int key_slots = static_cast<int>(call.key_slots);
  const auto scale = static_cast<float>(call.scale);
  stage_keys<T, kSize>(k, call.k_thought, c, key_slots, size);
  stage_keys<T, kSize>(v, call.v_thought, c, key_slots, size);

  KeySums<kSize> sums = {};
  const auto add_rows = [&](int quarter, int tiles) {
    const T* source = quarter % 2 ? q : dout;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      Left<T> left;
      load_matrices_t(left.r, in_tile<T, 32>(weights + tile * kTile * 32, lane / 16 * 8 + lane % 8,
                                             quarter % 2 * 16 + lane / 8 % 2 * 8));
#pragma unroll
      for (int n = 0; n < kSize / 32; ++n) {
        multiply(sums[n], left,
                 right_of_columns<kSize>(const_cast<T*>(source) + tile * kElements, 0,
                                         quarter / 2 * kHalf + n * 16),
                 false);
      }
    }
  };

  int first = 0;
  for (;;) {
    const int my_first = first + warp * kTile;
    // Addresses are not held from round to round: most columns have one.
    DiagonalColumn here = c;
    Mover<kSize> mover;
    int lane_at = lane_row();
    keep(here.column), keep(mover.row), keep(lane_at);
    const bool in_row = mover.d < size;
    const int from_d = in_row ? mover.d : 0;
    {
      const StagedRows<const T> from_q(call.q, s, here, from_d),
          from_dout(back.dout, s, here, from_d), from_out(call.out, s, here, from_d);
#pragma unroll
      for (int i = 0; i < mover.kSteps; ++i) {
        const StagedRow row = staged_row(s, my_first + mover.row + i * mover.kRows);
        const bool there = in_row && row.there;
        copy16_async(mover.in(q + warp * kElements, i), from_q.at(row), there);
        copy16_async(mover.in(dout + warp * kElements, i), from_dout.at(row), there);
        copy16_async(mover.in(own, i), from_out.at(row), there);
      }
    }
    commit_copies();
    StagedRow mine[2];
    float lse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[r] = staged_row(s, my_first + lane_row() + 8 * r);
      lse[r] = mine[r].there ? *StagedRows<const float>(call.lse, s, here).at(mine[r]) : -INFINITY;
    }
    wait_for_copies<0>();
    if (first == 0) {
      __syncthreads();  // all warps have fetched keys and values
    } else {
      __syncwarp();
    }

    float p[1][1][2][4], ds[2][4] = {}, dots[2][4] = {};
    multiply_rows<kSize, false>(p, q + warp * kElements, k, 0, false);
    // The products of the rows of dout with those of out have delta on their diagonal.
#pragma unroll 2
    for (int d = 0; d < kSize; d += 16) {
      const Left<T> left = left_of_tile<kSize>(dout + warp * kElements, 0, d);
      multiply(ds, left, right_of_rows<kSize>(v, 0, d), false);
      multiply(dots, left, right_of_rows<kSize>(own, 0, d), false);
    }
    __syncwarp();  // out has been read
    {
      const StagedRows<const T> from(back.text_dq, s, here, from_d);
#pragma unroll
      for (int i = 0; i < mover.kSteps; ++i) {
        const StagedRow row = staged_row(s, my_first + mover.row + i * mover.kRows);
        copy16_async(mover.in(own, i), from.at(row), in_row && row.there && s.has_text);
      }
    }
    commit_copies();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool odd = lane_row() % 2 == 1;
      const float on_diagonal = odd ? dots[r][2 * r + 1] : dots[r][2 * r];
      const float delta = __shfl_sync(kAllLanes, on_diagonal, lane / 4 * 4 + lane_row() / 2);
      if (mine[r].there && lane_pair() == 0) {
        *StagedRows<float>(back.delta, s, here).at(mine[r]) = delta;
      }
      const bool sees = mine[r].there && lse[r] != -INFINITY;
      const int seen = sees ? min(static_cast<int>(mine[r].slot) + 1 + key_slots -
                                      static_cast<int>(call.query_slots),
                                  key_slots)
                            : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &x = p[0][0][i / 2][2 * r + i % 2], &dx = ds[i / 2][2 * r + i % 2];
        const bool sees_key = i / 2 * 8 + 2 * lane_pair() + i % 2 < seen;
        x = sees_key ? fast_exp2((x * scale - lse[r]) * kLog2e) : 0;
        dx = sees_key ? x * (dx - delta) * scale : 0;
      }
    }
    const Left<T> of_p = left_of_results<T>(p[0][0]), of_ds = left_of_results<T>(ds);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T* at = in_tile<T, 32>(weights + warp * kTile * 32, lane_at + i % 2 * 8,
                             i / 2 * 8 + 2 * lane_pair());
      *reinterpret_cast<unsigned*>(at) = of_p.r[i];
      at = in_tile<T, 32>(weights + warp * kTile * 32, lane_at + i % 2 * 8,
                          16 + i / 2 * 8 + 2 * lane_pair());
      *reinterpret_cast<unsigned*>(at) = of_ds.r[i];
    }
    __syncthreads();  // the weights of all warps are there
    add_rows(warp, min(warps, (s.rows - first + kTile - 1) / kTile));

    wait_for_copies<0>();
    __syncwarp();  // the text part of dq is there
#pragma unroll 4
    for (int n = 0; n < kSize; n += 16) {
      float sum[2][4] = {};
      multiply(sum, of_ds, right_of_columns<kSize>(k, 0, n), false);
      add_sums<T, kSize>(own, lane_at, n, sum, {1.0f, 1.0f}, {1.0f, 1.0f});
    }
    __syncwarp();
    unstage_rows<T, kSize>(back.dq, s, here, my_first, own, size);
    __syncwarp();  // dq has been read
    first += warps * kTile;
    if (first >= s.rows) break;
    __syncthreads();  // q, dout and the weights have been read
  }

  // A block of fewer warps than quarters has had all its rows at once: they are still there.
  for (int quarter = warp;;) {
    T* tile = own;
#pragma unroll
    for (int n = 0; n < kSize / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2, half = i / 2;
        attention::put_two(in_tile_beside<T, kSize>(tile, lane_row() + 8 * r,
                                                    8 * half + 2 * lane_pair(), 0, n * 16),
                           sums[n][half][2 * r], sums[n][half][2 * r + 1]);
      }
    }
    __syncwarp();
    constexpr int kChunks = kHalf / 8;
    const AttentionTensor& to = quarter % 2 ? back.dk_thought : back.dv_thought;
    const int d = lane % kChunks * 8, column = quarter / 2 * kHalf + d;
    T* row = key_slots > 0 ? element<T>(to, c.batch, c.head, 0, c.column) + column : nullptr;
#pragma unroll
    for (int r = lane / kChunks; r < kTile; r += 32 / kChunks) {
      if (r >= key_slots || column >= size) continue;
      store16_global(row + static_cast<unsigned>(r) * static_cast<unsigned>(to.slot),
                     load16(in_tile<T, kSize>(tile, r, d)));
    }
    quarter += warps;
    if (quarter >= 4) return;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kSize / 4; ++n) sums[n / 8][n / 4 % 2][n % 4] = 0;
    add_rows(quarter, (s.rows + kTile - 1) / kTile);
  }
}

}  // namespace quietstar::cuda::diagonal
