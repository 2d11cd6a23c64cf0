// First kernel of thought_attention's backward pass: dq and delta.
// With p = 2^(x - lse) and delta = sum(dout * out) - dlse, per row and key
//   ds = p (dout.v - delta) [times 1 - tanh^2 under a cap],   dq = scale sum ds k.
//
// A block takes the rows of a pair as the forward kernel does, and a warp its 16 or 32 of them: q
// and dout stay in shared memory, keys and values come in tiles of two turns, three products are
// taken per tile, and dq is summed in registers. out is read once, for delta, which the second
// kernel (thought_attention_key_gradients.cuh) needs, too.
//
// Bytes from memory: q, out, dout, dq once; keys and values once per block. Operations: 6 D and one
// exponential per row and key.
#pragma once

#include "thought_attention_mma.cuh"

namespace quietstar::cuda::attention {

template <class T, int kSize, bool kSmall>
struct RowGradients {
  static constexpr Shape kShape = row_gradient_shape(sizeof(T), kSize, kSmall);
  static constexpr int kRows = kShape.rows(), kKeys = kShape.keys, kThreads = kShape.threads();
  static constexpr int kRowTiles = kShape.row_tiles, kKeyTiles = kKeys / 16, kWide = kSize / 16;

  float dq[kRowTiles][kWide][2][4];
  float scores[kRowTiles][kKeyTiles][2][4], dscores[kRowTiles][kKeyTiles][2][4];

  // dscores = ds, from scores = q k^T and dscores = dout v^T. lse, delta and what is seen are those
  // of the warp's rows; with kEdge, of `keys` those count that they see.
  template <bool kEdge>
  __device__ __forceinline__ void differentiate(const Arguments& a, const SeenBy& mine,
                                                const float* lse, const float* delta,
                                                const KeyTile& keys) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (a.scores != Scores::plain) {  // asked once, not of every score
#pragma unroll
      for (int j = 0; j < kRowTiles * kKeyTiles * 8; ++j) {
        float& x = scores[j / (kKeyTiles * 8)][j / 8 % kKeyTiles][j / 4 % 2][j % 4];
        x = score_of<T>(a, x);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int row = r * 16 + low * 8 + lane / 4;
        const float my_lse = lse[row], my_delta = delta[row];
#pragma unroll
        for (int j = 0; j < kKeyTiles * 4; ++j) {
          float& ds = dscores[r][j / 4][j / 2 % 2][low * 2 + j % 2];
          const float x = scores[r][j / 4][j / 2 % 2][low * 2 + j % 2];
          ds = exp2_of<T>(x * a.outer - my_lse) * (ds - my_delta);
        }
      }
    }
    if (a.scores == Scores::capped) {
#pragma unroll
      for (int j = 0; j < kRowTiles * kKeyTiles * 8; ++j) {
        const float x = scores[j / (kKeyTiles * 8)][j / 8 % kKeyTiles][j / 4 % 2][j % 4];
        dscores[j / (kKeyTiles * 8)][j / 8 % kKeyTiles][j / 4 % 2][j % 4] *= 1 - x * x;
      }
    }
    if (!kEdge) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const Range seen = mine.range(a, keys.slots, r * 16 + low * 8 + lane / 4);
        const int here = keys.begin + lane % 4 * 2, from = seen.first - here, to = seen.last - here;
#pragma unroll
        for (int j = 0; j < kKeyTiles * 4; ++j) {
          const int key = j / 2 * 8 + j % 2;
          if (key < from || key >= to) dscores[r][j / 4][j / 2 % 2][low * 2 + j % 2] = 0;
        }
      }
    }
  }
};

// delta of the warp's rows, to memory and, with lse to the base of 2, to shared memory.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void row_constants(const Arguments& a, const Pair& pair, int first_row,
                                              T* dout, float* lse, float* delta) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack;
  // Lanes that share a row: the largest power of two that divides its chunks.
  constexpr int kLanes = (kChunks & -kChunks) < 32 ? (kChunks & -kChunks) : 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < kRows; first += 32 / kLanes) {
    const int r = first + lane / kLanes;
    const bool exists = first_row + r < a.rows;
    const Row row = row_of(a, pair, exists ? first_row + r : 0);
    const T* out = element<const T>(a.out, pair, row);
    float sum = 0;
    for (int d = lane % kLanes * kPack; exists && d < a.size; d += kLanes * kPack) {
      const Pack<T> left = load16(in_tile<T, kSize>(dout, r, d));
      if (a.out_aligned) {
        const Pack<T> right = load16(out + d);
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum += to_float(left.at[i]) * to_float(right.at[i]);
      } else {
        for (int i = 0; i < kPack && d + i < a.size; ++i) {
          sum += to_float(left.at[i]) * to_float(out[d + i]);
        }
      }
    }
    for (int step = kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    if (lane % kLanes != 0) continue;
    float my_lse = 0;
    if (exists) {
      const std::int64_t at = flat(a, pair, row);
      my_lse = a.lse[at] * kLog2E;
      if (a.dlse) sum -= a.dlse[at];
      // A row that sees nothing: every key is masked.
      if (my_lse == -INFINITY) my_lse = sum = 0;
      a.delta[at] = sum;
    }
    lse[r] = my_lse;
    delta[r] = sum;
  }
}

template <class T, int kSize, bool kSmall>
__global__ void __launch_bounds__(RowGradients<T, kSize, kSmall>::kThreads)
    row_gradients_kernel(const Arguments a) {
  using Tile = RowGradients<T, kSize, kSmall>;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  constexpr int kRowTiles = Tile::kRowTiles, kWarpRows = kRowTiles * 16;
  QUIETSTAR_DYNAMIC_SHARED(memory);
  T* q = reinterpret_cast<T*>(memory);
  T* dout = q + kRows * kSize;
  T* k = dout + kRows * kSize;
  int* seen_by = reinterpret_cast<int*>(k + 4 * kKeys * kSize);
  float* lse = reinterpret_cast<float*>(seen_by + kSeenBy * kRows);
  float* delta = lse + kRows;
  Span* spans = reinterpret_cast<Span*>(delta + kRows);

  const Pair pair = pair_of(a, static_cast<int>(blockIdx.x) % a.pairs);
  const int first_row =
      static_cast<int>((gridDim.x - 1 - blockIdx.x) / static_cast<unsigned>(a.pairs)) * kRows;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  load_rows<T, kSize, kRows, kThreads>(a, pair, a.q, first_row, q, a.q_aligned);
  load_rows<T, kSize, kRows, kThreads>(a, pair, a.dout, first_row, dout, a.dout_aligned);
  commit_copies();
  const SeenBy mine = find_spans<kRows, kWarpRows, kThreads>(a, pair, first_row, seen_by, spans)
                          .from(warp * kWarpRows);
  const Span* my_spans = spans + 2 + 2 * warp;

  const int text_tiles = max(spans[0].high - spans[0].low + kKeys - 1, 0) / kKeys;
  const int tiles = text_tiles + max(spans[1].high - spans[1].low + kKeys - 1, 0) / kKeys;
  const auto tile_at = [&](int i) {
    const bool of_slots = i >= text_tiles;
    const Span& all = spans[of_slots];
    return KeyTile{of_slots, all.low + (of_slots ? i - text_tiles : i) * kKeys, all.high};
  };
  const auto load = [&](int i) {
    const KeyTile keys = tile_at(i);
    T* to = k + i % 2 * 2 * kKeys * kSize;
    load_keys<T, kSize, kKeys, kThreads>(a, pair, a.k_text, a.k_thought, keys, to);
    load_keys<T, kSize, kKeys, kThreads>(a, pair, a.v_text, a.v_thought, keys, to + kKeys * kSize);
  };
  if (tiles > 0) load(0);
  commit_copies();
  wait_for_copies<1>();
  __syncthreads();  // q and dout are there
  T* my_q = q + warp * kWarpRows * kSize;
  T* my_dout = dout + warp * kWarpRows * kSize;
  float* my_lse = lse + warp * kWarpRows;
  float* my_delta = delta + warp * kWarpRows;
  row_constants<T, kSize, kWarpRows>(a, pair, first_row + warp * kWarpRows, my_dout, my_lse,
                                     my_delta);
  __syncwarp();

  Tile tile;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < Tile::kWide * 8; ++n) tile.dq[r][n / 8][n / 4 % 2][n % 4] = 0;
  }
  for (int i = 0; i < tiles; ++i) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before it any more
    if (i + 1 < tiles) load(i + 1);
    commit_copies();
    const KeyTile keys = tile_at(i);
    T* k_tile = k + i % 2 * 2 * kKeys * kSize;
    T* v_tile = k_tile + kKeys * kSize;
    const Span& span = my_spans[keys.slots];
    if (!keys.slots && span.covers(keys.begin, keys.begin + kKeys)) {
      multiply_rows<kSize, false>(tile.scores, my_q, k_tile, 0, a.precise);
      multiply_rows<kSize, false>(tile.dscores, my_dout, v_tile, 0, a.precise);
      tile.template differentiate<false>(a, mine, my_lse, my_delta, keys);
      add_weighted<kSize, false>(tile.dq, tile.dscores, k_tile, 0, a.precise);
      continue;
    }
    const unsigned seen = groups_seen<Tile::kKeyTiles>(span, keys);
    if (seen == 0) continue;
    multiply_rows<kSize, true>(tile.scores, my_q, k_tile, seen, a.precise);
    multiply_rows<kSize, true>(tile.dscores, my_dout, v_tile, seen, a.precise);
    tile.template differentiate<true>(a, mine, my_lse, my_delta, keys);
    add_weighted<kSize, true>(tile.dq, tile.dscores, k_tile, seen, a.precise);
  }
  wait_for_copies<0>();
  __syncwarp();

  // The warp's own rows of q, which nobody reads any more, turn the rows into whole chunks.
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < Tile::kWide * 4; ++n) {
      const float* from = &tile.dq[r][n / 4][n / 2 % 2][n % 2 * 2];
      put_two(in_tile<T, kSize>(my_q, r * 16 + n % 2 * 8 + lane / 4, n / 2 * 8 + lane % 4 * 2),
              from[0] * a.scale, from[1] * a.scale);
    }
  }
  __syncwarp();
  store_rows<T, kSize, kWarpRows>(a, pair, a.dq, first_row + warp * kWarpRows, my_q,
                                  a.gradients_aligned);
}

template <class T, int kSize, bool kSmall>
void launch_row_gradients(const Arguments& a, const Device& device) {
  using Tile = RowGradients<T, kSize, kSmall>;
  launch("thought_attention_row_gradients", device, row_gradients_kernel<T, kSize, kSmall>,
         blocks(ceil_div(a.rows, Tile::kRows) * a.pairs), dim3(Tile::kThreads),
         row_gradient_bytes(sizeof(T), kSize, kSmall), a);
}

}  // namespace quietstar::cuda::attention
