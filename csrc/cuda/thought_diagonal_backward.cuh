// thought_diagonal backward for bf16 and fp16.
#pragma once

#include "thought_diagonal_tiles.cuh"

namespace quietstar::cuda::diagonal {

// sum(dout * out) of this lane's rows.
template <class T, int kSize>
__device__ __forceinline__ void dot_rows(float (&delta)[2], const AttentionTensor& a,
                                         const AttentionTensor& b, const DiagonalColumn& c,
                                         const TileRows& rows, int size) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T *x = row_of<T>(a, c, rows.row[r]), *y = row_of<T>(b, c, rows.row[r]);
    float sum = 0;
#pragma unroll(kSize > 64 ? 2 : 1)
    for (int d0 = 0; d0 < kSize; d0 += 32) {
      const int d = d0 + 8 * lane_pair();
      const Eight p = load8(x, d, size, rows.row[r].there);
      const Eight q = load8(y, d, size, rows.row[r].there);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 u = floats<T>(p.at[i]), v = floats<T>(q.at[i]);
        sum += u.x * v.x + u.y * v.y;
      }
    }
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    delta[r] = sum + __shfl_xor_sync(kAllLanes, sum, 2);
  }
}

// Weights p and gradients of the scores (times scale) of a tile of rows and 16 keys.
template <class T, int kSize>
__device__ __forceinline__ void weights_of(float (&p)[2][4], float (&ds)[2][4],
                                           const ThoughtDiagonalBackward& back,
                                           const DiagonalColumn& c, const TileRows& rows,
                                           const float (&delta)[2], int first) {
  const ThoughtDiagonal& call = back.forward;
  const int size = static_cast<int>(call.head_size);
  const int key_slots = static_cast<int>(call.key_slots);
  const auto scale = static_cast<float>(call.scale);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[j][i] = ds[j][i] = 0;
  }
  times_keys<T, kSize>(p, call.q, rows, call.k_thought, c, first, key_slots, size);
  times_keys<T, kSize>(ds, back.dout, rows, call.v_thought, c, first, key_slots, size);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const DiagonalRow& row = rows.row[r];
    const float lse = row.there ? *number_of(call.lse, c, row) : -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = i / 2, at = 2 * r + i % 2;
      const int key = first + 8 * j + 2 * lane_pair() + i % 2;
      const bool seen = key < row.seen && lse != -INFINITY;
      p[j][at] = seen ? fast_exp2((p[j][at] * scale - lse) * kLog2e) : 0;
      ds[j][at] = seen ? p[j][at] * (ds[j][at] - delta[r]) * scale : 0;
    }
  }
}

// A block per column and key head. dk and dv sum over all rows of the column: the warps leave the
// weights of their rows in shared memory, and then each sums its own 64 columns of dk or dv. Where
// all keys fit one tile, dq is finished on the way; otherwise a first pass over the rows does it.
template <class T, int kSize>
__global__ void __launch_bounds__(32 * kBackwardWarps<kSize>, kBackwardBlocks<kSize>)
    diagonal_backward(ThoughtDiagonalBackward back) {
  constexpr int kWarps = kBackwardWarps<kSize>;
  constexpr int kPitch = kWarps * kTile + 8;  // so that lanes read distinct banks
  constexpr int kParts = kSize / 64;
  static_assert(2 * kParts <= kWarps, "a warp for every part of dk and of dv");
  // Read two elements at a time, so a word must not lie across two of the memory's.
  struct alignas(16) Weights {
    T at[kTile][kPitch];  // keys x rows
  };
  QUIETSTAR_SHARED(Weights, shared, [2]);  // p, then ds
  const ThoughtDiagonal& call = back.forward;
  const DiagonalColumn c = diagonal_column(call, blockIdx.x);
  const int size = static_cast<int>(call.head_size);
  const int count = static_cast<int>(call.q_heads / call.kv_heads * call.query_slots);
  const int tiles = (count + kTile - 1) / kTile;
  const int key_slots = static_cast<int>(call.key_slots);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const bool one_tile = key_slots <= kTile;
  const float ones[2] = {1, 1};

  const auto find_delta = [&](const TileRows& rows, float (&delta)[2]) {
    dot_rows<T, kSize>(delta, back.dout, call.out, c, rows, size);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows.row[r].there && lane_pair() == 0) *number_of(back.delta, c, rows.row[r]) = delta[r];
    }
  };

  if (!one_tile || key_slots == 0) {
    for (int tile = warp; tile < tiles; tile += kWarps) {
      const TileRows rows = tile_rows(call, c, tile);
      float delta[2];
      find_delta(rows, delta);
      const int seen = seen_by_tile(call, c, tile, count);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        float sum[8][4] = {};
        for (int first = 0; first < seen; first += kTile) {
          float p[2][4], ds[2][4];
          weights_of<T, kSize>(p, ds, back, c, rows, delta, first);
          unsigned weights[4];
          as_operand<T>(weights, ds);
          weigh_rows<T>(sum, weights, 64 * part, size,
                        key_rows<T>(call.k_thought, c, first, key_slots));
        }
        store_rows<T>(back.dq, &back.text_dq, c, rows, sum, ones, ones, part, size);
      }
    }
    __syncthreads();  // delta is read below by other lanes than those that wrote it
  }

  const bool is_dk = warp % 2 == 1;
  const int own_part = warp / 2;
  for (int first = 0; first < key_slots; first += kTile) {
    float sum[8][4] = {};
    for (int chunk = 0; chunk < tiles; chunk += kWarps) {
      float p[2][4] = {}, ds[2][4] = {};
      const int tile = chunk + warp;
      const bool sees = tile < tiles && seen_by_tile(call, c, tile, count) > first;
      if (one_tile ? tile < tiles : sees) {
        const TileRows rows = tile_rows(call, c, tile);
        float delta[2] = {0, 0};
        if (one_tile) {
          find_delta(rows, delta);
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (rows.row[r].there) delta[r] = *number_of(back.delta, c, rows.row[r]);
          }
        }
        weights_of<T, kSize>(p, ds, back, c, rows, delta, first);
        if (one_tile) {
          unsigned weights[4];
          as_operand<T>(weights, ds);
#pragma unroll 1
          for (int part = 0; part < kParts; ++part) {
            float dq[8][4] = {};
            weigh_rows<T>(dq, weights, 64 * part, size,
                          key_rows<T>(call.k_thought, c, first, key_slots));
            store_rows<T>(back.dq, &back.text_dq, c, rows, dq, ones, ones, part, size);
          }
        }
      }
      __syncthreads();  // the last chunk's weights have been read
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = i / 4 * 8 + 2 * lane_pair() + i % 2;
        const int row = kTile * warp + lane_row() + i / 2 % 2 * 8;
        shared[0].at[key][row] = from_float<T>(p[i / 4][i % 4]);
        shared[1].at[key][row] = from_float<T>(ds[i / 4][i % 4]);
      }
      __syncthreads();
      for (int step = 0; step < kWarps && chunk + step < tiles && own_part < kParts; ++step) {
        unsigned weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T* pair =
              &shared[is_dk].at[lane_row() + i % 2 * 8][kTile * step + 2 * lane_pair() + i / 2 * 8];
          weights[i] = *reinterpret_cast<const unsigned*>(pair);
        }
        const AttentionTensor& source = is_dk ? call.q : back.dout;
        weigh_rows<T>(sum, weights, 64 * own_part, size, [&](int i, bool& there) {
          const DiagonalRow row = diagonal_row(call, c, (chunk + step) * kTile + i);
          there = row.there;
          return row_of<T>(source, c, row);
        });
      }
    }
    // A key is a row of its tensor.
    TileRows keys;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = first + lane_row() + 8 * r;
      keys.row[r] = {key < key_slots && own_part < kParts, c.head, key, 0};
    }
    store_rows<T>(is_dk ? back.dk_thought : back.dv_thought, nullptr, c, keys, sum, ones, ones,
                  own_part, size);
  }
}

}  // namespace quietstar::cuda::diagonal
