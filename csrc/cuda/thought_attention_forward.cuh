// Forward kernel of thought_attention: out = sum 2^(x - lse) v over the keys that a row sees.
//
// A block takes 128 rows of a pair (fp32: 64) and walks over the text keys that its rows see
// between them, 32 at a time, and then over the slot keys of its columns. Per tile of keys a warp
// multiplies its 16 or 32 rows with the keys, keeps the running maximum and sum of each row, and
// adds the weights times the values to sums in registers; the weights go from one product to the
// next without leaving their registers. Groups of 16 keys that no row of the warp sees are passed
// over, so a causal edge costs about what it must, and of the slots a warp multiplies with those of
// its own one to three columns only. Values of a tile arrive while its scores are computed, and the
// keys of the next one during the rest.
//
// Where the grid would leave the device idle, the tiles of a block are divided over gridDim.y
// blocks, whose results merge_kernel puts together.
//
// Bytes from memory: q, out and lse once; keys and values once per block (2 D elements per key for
// 128 rows, from L2 mostly). Operations: 4 D and one exponential per row and key.
#pragma once

#include "thought_attention_merge.cuh"
#include "thought_attention_mma.cuh"

namespace quietstar::cuda::attention {

template <class T, int kSize, bool kSmall>
struct Forward {
  static constexpr Shape kShape = forward_shape(sizeof(T), kSize, kSmall);
  static constexpr int kRows = kShape.rows(), kKeys = kShape.keys, kThreads = kShape.threads();
  static constexpr int kRowTiles = kShape.row_tiles, kKeyTiles = kKeys / 16, kWide = kSize / 16;

  float out[kRowTiles][kWide][2][4];
  float top[kRowTiles][2], sum[kRowTiles][2];  // of each row; sums of this thread's keys only
  float scores[kRowTiles][kKeyTiles][2][4];

  // scores = weights relative to the new maximum; out and sum are brought to it. With kEdge, of
  // `keys` those count that the warp's rows see.
  template <bool kEdge>
  __device__ __forceinline__ void weigh(const Arguments& a, const SeenBy& mine,
                                        const KeyTile& keys) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (a.scores != Scores::plain) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int j = 0; j < kKeyTiles * 8; ++j) {
          float& x = scores[r][j / 8][j / 4 % 2][j % 4];
          x = score_of<T>(a, x);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int row = r * 16 + low * 8 + lane / 4;
        if (kEdge) {
          const Range seen = mine.range(a, keys.slots, row);
          const int here = keys.begin + lane % 4 * 2, from = seen.first - here,
                    to = seen.last - here;
#pragma unroll
          for (int j = 0; j < kKeyTiles * 4; ++j) {
            const int key = j / 2 * 8 + j % 2;
            float& x = scores[r][j / 4][j / 2 % 2][low * 2 + j % 2];
            if (key < from || key >= to) x = -INFINITY;
          }
        }
        float row_max = top[r][low];
#pragma unroll
        for (int j = 0; j < kKeyTiles * 4; ++j) {
          row_max = fmaxf(row_max, scores[r][j / 4][j / 2 % 2][low * 2 + j % 2]);
        }
        row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 1));
        row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 2));
        // Both products must be rounded alike. In an fma with base, the old one would leave behind
        // what the rounding of the new one cut off: an unchanged maximum would not shrink by 1.
        const float base = row_max == -INFINITY ? 0 : __fmul_rn(row_max, a.outer);
        const float shrink = exp2_of<T>(__fmul_rn(top[r][low], a.outer) - base);
        top[r][low] = row_max;
        float total = 0;
#pragma unroll
        for (int j = 0; j < kKeyTiles * 4; ++j) {
          float& x = scores[r][j / 4][j / 2 % 2][low * 2 + j % 2];
          x = exp2_of<T>(x * a.outer - base);  // one fma: relative to base itself, whatever it is
          total += x;
        }
        sum[r][low] = sum[r][low] * shrink + total;
        if (__all_sync(kAllLanes, shrink == 1)) continue;  // true of most tiles but the first few
#pragma unroll
        for (int n = 0; n < kWide * 2; ++n) {
          out[r][n / 2][n % 2][low * 2] *= shrink;
          out[r][n / 2][n % 2][low * 2 + 1] *= shrink;
        }
      }
    }
  }
};

template <class T, int kSize, bool kSmall>
__global__ void __launch_bounds__(Forward<T, kSize, kSmall>::kThreads)
    forward_kernel(const Arguments a) {
  using Tile = Forward<T, kSize, kSmall>;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  constexpr int kRowTiles = Tile::kRowTiles, kWarpRows = kRowTiles * 16;
  QUIETSTAR_DYNAMIC_SHARED(memory);
  T* q = reinterpret_cast<T*>(memory);
  T* k = q + kRows * kSize;
  int* seen_by = reinterpret_cast<int*>(k + 4 * kKeys * kSize);

  // The longest stretches of text, those of the last columns, come first.
  const int pair_number = static_cast<int>(blockIdx.x) % a.pairs;
  const int first_row =
      static_cast<int>((gridDim.x - 1 - blockIdx.x) / static_cast<unsigned>(a.pairs)) * kRows;
  const Pair pair = pair_of(a, pair_number);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  load_rows<T, kSize, kRows, kThreads>(a, pair, a.q, first_row, q, a.q_aligned);
  // Read where they are needed, as registers are short.
  Span* spans = reinterpret_cast<Span*>(seen_by + kSeenBy * kRows);
  const SeenBy mine = find_spans<kRows, kWarpRows, kThreads>(a, pair, first_row, seen_by, spans)
                          .from(warp * kWarpRows);
  const Span* my_spans = spans + 2 + 2 * warp;

  // Of the tiles of text and slots, each split takes as many as the others.
  const int split = static_cast<int>(blockIdx.y);
  const int text_tiles = max(spans[0].high - spans[0].low + kKeys - 1, 0) / kKeys;
  const int all_tiles = text_tiles + max(spans[1].high - spans[1].low + kKeys - 1, 0) / kKeys;
  const int begin = all_tiles * split / a.splits;
  const int end = all_tiles * (split + 1) / a.splits;
  const auto tile_at = [&](int i) {
    const bool of_slots = i >= text_tiles;
    const Span& all = spans[of_slots];
    return KeyTile{of_slots, all.low + (of_slots ? i - text_tiles : i) * kKeys, all.high};
  };

  Tile tile;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      tile.top[r][low] = -INFINITY;
      tile.sum[r][low] = 0;
    }
#pragma unroll
    for (int n = 0; n < Tile::kWide * 8; ++n) tile.out[r][n / 8][n / 4 % 2][n % 4] = 0;
  }
  T* my_q = q + warp * kWarpRows * kSize;
  const auto load = [&](int i) {
    const KeyTile keys = tile_at(i);
    T* to = k + i % 2 * 2 * kKeys * kSize;
    load_keys<T, kSize, kKeys, kThreads>(a, pair, a.k_text, a.k_thought, keys, to);
    load_keys<T, kSize, kKeys, kThreads>(a, pair, a.v_text, a.v_thought, keys, to + kKeys * kSize);
  };
  if (begin < end) load(begin);
  commit_copies();
  for (int i = begin; i < end; ++i) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before it any more
    if (i + 1 < end) load(i + 1);
    commit_copies();
    const KeyTile keys = tile_at(i);
    T* k_tile = k + i % 2 * 2 * kKeys * kSize;
    T* v_tile = k_tile + kKeys * kSize;
    const Span& span = my_spans[keys.slots];
    if (!keys.slots && span.covers(keys.begin, keys.begin + kKeys)) {
      multiply_rows<kSize, false>(tile.scores, my_q, k_tile, 0, a.precise);
      tile.template weigh<false>(a, mine, keys);
      add_weighted<kSize, false>(tile.out, tile.scores, v_tile, 0, a.precise);
      continue;
    }
    const unsigned seen = groups_seen<Tile::kKeyTiles>(span, keys);
    if (seen == 0) continue;
    multiply_rows<kSize, true>(tile.scores, my_q, k_tile, seen, a.precise);
    tile.template weigh<true>(a, mine, keys);
    add_weighted<kSize, true>(tile.out, tile.scores, v_tile, seen, a.precise);
  }
  wait_for_copies<0>();
  // Where there was no tile, nobody has waited for the warp's rows of q, which all warps fetch: one
  // that arrives late would lie on top of the results.
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const int r_in_warp = r * 16 + low * 8 + lane / 4;
      const int number = first_row + warp * kWarpRows + r_in_warp;
      const bool exists = number < a.rows;
      const Row row = row_of(a, pair, exists ? number : 0);
      float total = tile.sum[r][low];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      // The base of the sums, to the bit.
      float top = tile.top[r][low] == -INFINITY ? -INFINITY : __fmul_rn(tile.top[r][low], a.outer);
      float factor = 1;
      if (a.sinks && a.splits == 1) {
        const float sink = a.sinks[row.head] * kLog2E, higher = fmaxf(top, sink);
        if (higher != -INFINITY) {
          factor = exp2_of<T>(top - higher);
          total = total * factor + exp2_of<T>(sink - higher);
          top = higher;
        }
      }
      factor = total == 0 ? 0 : factor / total;
      const float lse = total == 0 ? -INFINITY : top + log2f(total);
      if (a.splits == 1) {
        if (exists && lane % 4 == 0) a.lse[flat(a, pair, row)] = lse * kLn2;
      } else if (exists) {
        const std::int64_t at =
            (static_cast<std::int64_t>(split) * a.pairs + pair_number) * a.rows + number;
        if (lane % 4 == 0) a.split_lse[at] = lse;
        float* to = a.split_out + at * kSize + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < Tile::kWide * 2; ++n) {
          const float* from = &tile.out[r][n / 2][n % 2][low * 2];
          *reinterpret_cast<float2*>(to + n * 8) = make_float2(from[0] * factor, from[1] * factor);
        }
      }
      // The warp's own rows of q, which nobody reads any more, turn the rows into whole chunks.
#pragma unroll
      for (int n = 0; n < Tile::kWide * 2; ++n) {
        const float* from = &tile.out[r][n / 2][n % 2][low * 2];
        put_two(in_tile<T, kSize>(my_q, r_in_warp, n * 8 + lane % 4 * 2), from[0] * factor,
                from[1] * factor);
      }
    }
  }
  __syncwarp();
  if (a.splits == 1) {
    store_rows<T, kSize, kWarpRows>(a, pair, a.out, first_row + warp * kWarpRows, my_q,
                                    a.out_aligned);
  }
}

template <class T, int kSize, bool kSmall>
void launch_forward(const Arguments& a, const Device& device) {
  using Tile = Forward<T, kSize, kSmall>;
  dim3 grid = blocks(ceil_div(a.rows, Tile::kRows) * a.pairs);
  grid.y = static_cast<unsigned>(a.splits);
  launch("thought_attention", device, forward_kernel<T, kSize, kSmall>, grid, dim3(Tile::kThreads),
         forward_bytes(sizeof(T), kSize, kSmall), a);
  if (a.splits == 1) return;
  launch("thought_attention_merge", device, merge_kernel<T, kSize>,
         blocks(std::int64_t{a.rows} * a.pairs, kMergeWarps), dim3(kMergeWarps * 32), 0, a);
}

}  // namespace quietstar::cuda::attention
