// First kernel of thought_attention's backward pass: dq and delta.
// With p = 2^(x - lse) and delta = sum(dout * out) - dlse, per row and key
//   ds = p (dout.v - delta) [times 1 - tanh^2 under a cap],   dq = scale sum ds k.
//
// A block takes the rows of a pair as the forward kernel does, and a warp its 16 or 32 of them: q
// and dout stay in shared memory, keys and values come in tiles of two turns, three products are
// taken per tile, and dq is summed in registers. out is read once, for delta, which the kernels
// of the keys' gradients (thought_attention_{key,slot}_gradients.cuh) need, too.
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

// Sums of dout * out of the warp's rows, to shared memory. Some rows of out are under way at once.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void dots_of_rows(const Arguments& a, const Pair& pair, int first_row,
                                             T* dout, float* dots) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack;
  // Lanes that share a row: the largest power of two that divides its chunks.
  constexpr int kLanes = (kChunks & -kChunks) < 32 ? (kChunks & -kChunks) : 32;
  constexpr int kOfLane = kChunks / kLanes, kStep = 32 / kLanes;
  constexpr int kAtOnce = kRows / kStep < 8 ? kRows / kStep : 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, d = lane % kLanes * kPack;
  const RowsOfPair<const T> out(a, pair, a.out, 0);
#pragma unroll 1
  for (int first = lane / kLanes; first < kRows; first += kAtOnce * kStep) {
    Pack<T> packs[kAtOnce][kOfLane] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int number = first_row + first + i * kStep;
      if (number >= a.rows) continue;
      const T* row = out.row(a, number) + d;
#pragma unroll
      for (int n = 0; n < kOfLane; ++n) {
        const int at = n * kLanes * kPack;
        if (d + at >= a.size) continue;
        if (a.out_aligned) {
          packs[i][n] = load16(row + at);
        } else {
          for (int e = 0; e < kPack && d + at + e < a.size; ++e) packs[i][n].at[e] = row[at + e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kOfLane; ++n) {
        const Pack<T> left =
            load16(in_tile<T, kSize>(dout, first + i * kStep, d + n * kLanes * kPack));
#pragma unroll
        for (int e = 0; e < kPack; ++e) sum += to_float(left.at[e]) * to_float(packs[i][n].at[e]);
      }
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      if (lane % kLanes == 0) dots[first + i * kStep] = sum;
    }
  }
}

// delta of the warp's rows, to memory and, with lse to the base of 2, to shared memory; and what
// the kernels of keys have to know of them. A lane per row.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void put_row_constants(const Arguments& a, int pair_number,
                                                  int first_row, const SeenBy& mine, float* lse,
                                                  float* delta) {
  static_assert(kRows <= 32);
  const int r = static_cast<int>(threadIdx.x) % 32, number = first_row + r;
  if (r >= kRows) return;
  float my_lse = 0, my_delta = 0;
  if (number < a.rows) {
    const Pair pair = pair_of(a, pair_number);
    const std::int64_t at = flat(a, pair, row_of(a, pair, number));
    my_lse = a.lse[at] * kLog2E;
    my_delta = delta[r];
    if (a.dlse) my_delta -= a.dlse[at];
    // A row that sees nothing: every key is masked.
    if (my_lse == -INFINITY) my_lse = my_delta = 0;
    a.delta[at] = my_delta;
    const Range text = mine.range(a, false, r), slots = mine.range(a, true, r);
    const int constants[kRowConstants] = {text.first,
                                          text.last,
                                          slots.first,
                                          slots.last,
                                          __float_as_int(my_lse),
                                          __float_as_int(my_delta)};
    const std::int64_t all = static_cast<std::int64_t>(a.pairs) * a.rows;
    int* to = a.row_constants + static_cast<std::int64_t>(pair_number) * a.rows + number;
#pragma unroll
    for (int i = 0; i < kRowConstants; ++i) to[i * all] = constants[i];
  }
  lse[r] = my_lse;
  delta[r] = my_delta;
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

  const int pair_number = static_cast<int>(blockIdx.x) % a.pairs;
  const Pair pair = pair_of(a, pair_number);
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
  dots_of_rows<T, kSize, kWarpRows>(a, pair, first_row + warp * kWarpRows, my_dout, my_delta);
  __syncwarp();
  put_row_constants<T, kSize, kWarpRows>(a, pair_number, first_row + warp * kWarpRows, mine, my_lse,
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
