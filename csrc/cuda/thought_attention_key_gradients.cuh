// Second kernel of thought_attention's backward pass: the gradients of keys and values. Per row and
// key, with p and ds as in thought_attention_row_gradients.cuh,
//   dv += p dout,   dk += scale ds q.
//
// A block takes a tile of keys, of the text or of the slots of some columns, 16 of them a warp, and
// walks over the rows that see them, some at a time in two turns. A warp multiplies its keys with
// the rows, so that the results stand as keys x rows and go on as left operands without leaving
// their registers, and sums dk and dv in registers: no atomics. Steps of rows that do not see the
// warp's keys are passed over.
//
// Rows that see a tile of text are found by block_ranges: for every block of rows the first and the
// last key that one of them sees. With columns in the order of their anchors they are one stretch;
// in any order they lie somewhere in it and the others are passed over. Where there are too few
// tiles for the device, the stretch is cut into parts, summed apart in fp32 and added up in their
// order by reduce_parts_kernel. The rows of a tile of slots are those of its columns.
//
// Head sizes beyond 128 leave no room for both sums: one launch for the values, one for the keys.
//
// Bytes from memory: per tile of keys, q and dout of the rows that see it (from L2 mostly: tiles of
// one head run at the same time), 8 D per key and part. Operations: 8 D and one exponential per row
// and key (beyond 128: 10 D).
#pragma once

#include "thought_attention_mma.cuh"

namespace quietstar::cuda::attention {

enum class Pass { both, values, keys };

template <class T, int kSize, Pass kPass, bool kSmall>
struct KeyGradients {
  static constexpr KeyShape kShape = key_gradient_shape(sizeof(T), kSize, kSmall);
  static constexpr int kKeys = kShape.keys(), kRows = kShape.rows, kStep = kShape.step;
  static constexpr int kThreads = kShape.threads(), kWide = kSize / 16, kGroups = kStep / 16;
  // To a multiprocessor, as far as registers go.
  static constexpr int kBlocks = sizeof(T) == 2 && kSize <= 64 ? 3 : 1;
  static constexpr bool kValues = kPass != Pass::keys, kOfKeys = kPass != Pass::values;
  static_assert(4 * kRows <= kThreads, "a thread fetches one of four constants of a row");

  float dk[1][kWide][2][4];
  float dv[1][kWide][2][4];

  // Adds what kStep rows contribute to the warp's keys, of which the first has the number key.
  // constants: first, last, lse (to the base of 2) and delta of the rows, [4][kRows].
  __device__ __forceinline__ void add(const Arguments& a, T* k, T* v, T* q, T* dout,
                                      const int* constants, int key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Range seen{constants[lane % kStep], constants[kRows + lane % kStep]};
    if (!__any_sync(kAllLanes, seen.first < key + 16 && seen.last > key)) return;
    const bool masked = !__all_sync(kAllLanes, seen.first <= key && seen.last >= key + 16);
    const float* lse = reinterpret_cast<const float*>(constants + 2 * kRows);
    const float* delta = lse + kRows;

    // Under a cap, ds needs the tanh once more. In 16 bits it is exact enough to find it from its
    // weight, and no register holds it all the while.
    constexpr bool kHoldScores = kOfKeys && sizeof(T) == 4;
    float scores[1][kHoldScores ? kGroups : 1][2][4];
    float p[1][kGroups][2][4];
    multiply_rows<kSize, false>(p, k, q, 0, a.precise);
    if (a.scores != Scores::plain) {  // asked once, not of every score
#pragma unroll
      for (int j = 0; j < kGroups * 8; ++j) {
        float& x = p[0][j / 8][j / 4 % 2][j % 4];
        x = score_of<T>(a, x);
        if (kHoldScores) scores[0][j / 8][j / 4 % 2][j % 4] = x;
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      const int row = j / 4 * 8 + lane % 4 * 2 + j % 2;
      float& here = p[0][j / 8][j / 4 % 2][j % 4];
      here = exp2_of<T>(here * a.outer - lse[row]);
    }
    if (masked) {
#pragma unroll
      for (int j = 0; j < kGroups * 8; ++j) {
        const int row = j / 4 * 8 + lane % 4 * 2 + j % 2, mine = key + lane / 4 + j / 2 % 2 * 8;
        if (mine < constants[row] || mine >= constants[kRows + row]) {
          p[0][j / 8][j / 4 % 2][j % 4] = 0;
        }
      }
    }
    if (kValues) add_weighted<kSize, false>(dv, p, dout, 0, a.precise);
    if (!kOfKeys) return;
    float ds[1][kGroups][2][4];
    multiply_rows<kSize, false>(ds, v, dout, 0, a.precise);
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      const int row = j / 4 * 8 + lane % 4 * 2 + j % 2;
      float& here = ds[0][j / 8][j / 4 % 2][j % 4];
      here = p[0][j / 8][j / 4 % 2][j % 4] * (here - delta[row]);
    }
    if (a.scores == Scores::capped) {
#pragma unroll
      for (int j = 0; j < kGroups * 8; ++j) {
        const int row = j / 4 * 8 + lane % 4 * 2 + j % 2;
        const float x = kHoldScores
                            ? scores[0][j / 8 % (kHoldScores ? kGroups : 1)][j / 4 % 2][j % 4]
                            : (log2f(p[0][j / 8][j / 4 % 2][j % 4]) + lse[row]) / a.outer;
        ds[0][j / 8][j / 4 % 2][j % 4] *= 1 - x * x;
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups * 8; ++j) {
      // Of a masked key dout.v may be anything, and a weight of 0 has no logarithm.
      if (p[0][j / 8][j / 4 % 2][j % 4] == 0) ds[0][j / 8][j / 4 % 2][j % 4] = 0;
    }
    add_weighted<kSize, false>(dk, ds, q, 0, a.precise);
  }
};

// The stretch of row blocks in which every one lies that sees some of the keys.
__device__ __forceinline__ Range blocks_that_see(const int2* ranges, int blocks, int begin, int end,
                                                 int threads, int* scratch) {
  Range found{kFar, 0};
  for (int j = static_cast<int>(threadIdx.x); j < blocks; j += threads) {
    if (ranges[j].x < end && ranges[j].y > begin) {
      found.first = min(found.first, j);
      found.last = j + 1;
    }
  }
  found.first = __reduce_min_sync(kAllLanes, found.first);
  found.last = __reduce_max_sync(kAllLanes, found.last);
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32 * 2] = found.first;
    scratch[threadIdx.x / 32 * 2 + 1] = found.last;
  }
  __syncthreads();
  for (int w = 0; w < threads / 32; ++w) {
    found.first = min(found.first, scratch[w * 2]);
    found.last = max(found.last, scratch[w * 2 + 1]);
  }
  __syncthreads();  // scratch may be used again
  return found;
}

template <class T, int kSize, Pass kPass, bool kSmall>
__global__ void __launch_bounds__(KeyGradients<T, kSize, kPass, kSmall>::kThreads,
                                  KeyGradients<T, kSize, kPass, kSmall>::kBlocks)
    key_gradients_kernel(const Arguments a) {
  using Tile = KeyGradients<T, kSize, kPass, kSmall>;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  QUIETSTAR_DYNAMIC_SHARED(memory);
  T* k = reinterpret_cast<T*>(memory);
  T* v = k + kKeys * kSize;
  T* rows = v + kKeys * kSize;                                        // [2][q, dout][kRows][kSize]
  int* constants = reinterpret_cast<int*>(rows + 4 * kRows * kSize);  // [2][4][kRows]
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int thread = static_cast<int>(threadIdx.x);

  // Tiles of text come first, those that most rows see before the others.
  const int text_blocks = (a.text_length + kKeys - 1) / kKeys * a.parts * a.pairs;
  const bool slots = static_cast<int>(blockIdx.x) >= text_blocks;
  const int block = static_cast<int>(blockIdx.x) - (slots ? text_blocks : 0);
  const int pair_number = block % a.pairs;
  const Pair pair = pair_of(a, pair_number);
  const int part = slots ? 0 : block / a.pairs % a.parts;
  const int tile_number = block / a.pairs / (slots ? 1 : a.parts);
  const int limit = slots ? a.slot_keys : a.text_length;
  const KeyTile keys{slots, tile_number * kKeys, min(tile_number * kKeys + kKeys, limit)};

  load_keys<T, kSize, kKeys, kThreads>(a, pair, a.k_text, a.k_thought, keys, k);
  load_keys<T, kSize, kKeys, kThreads>(a, pair, a.v_text, a.v_thought, keys, v);

  // Blocks of rows begin .. end - 1, which start at row `base`.
  const int2* ranges = a.block_ranges + static_cast<std::int64_t>(pair.batch) * a.row_blocks;
  int base = 0, begin = 0, end = 0;
  if (slots) {
    const int column_rows = static_cast<int>(a.by_rows.divisor);
    const int first = keys.begin / a.slot_stride, last = (keys.end - 1) / a.slot_stride;
    base = first * column_rows;
    end = ((last + 1 - first) * column_rows + kRows - 1) / kRows;
  } else {
    const Range all =
        blocks_that_see(ranges, a.row_blocks, keys.begin, keys.end, kThreads, constants);
    if (all.first < all.last) {
      begin = all.first + (all.last - all.first) * part / a.parts;
      end = all.first + (all.last - all.first) * (part + 1) / a.parts;
    }
  }
  // What the loop asks about the next block of rows was read a round before.
  int2 range{};
  const auto read_range = [&](int j) {
    if (!slots && j >= begin) range = ranges[j];
  };
  // From the last rows to the first: a causal mask lets the last ones see every tile, so the tiles
  // of a head begin with the same rows and read them from L2.
  const auto next = [&](int j) {
    while (!slots && j >= begin && !(range.x < keys.end && range.y > keys.begin)) read_range(--j);
    return j;
  };
  const auto load = [&](int j, int turn) {
    T* to = rows + turn * 2 * kRows * kSize;
    const int first = base + j * kRows, number = first + thread % kRows;
    load_rows<T, kSize, kRows, kThreads>(a, pair, a.q, first, to, a.q_aligned);
    load_rows<T, kSize, kRows, kThreads>(a, pair, a.dout, first, to + kRows * kSize,
                                         a.dout_aligned);
    // A thread fetches one constant: first, last, lse or delta of a row. Rows past the end see what
    // the last one sees, and as zeros contribute nothing.
    const int which = thread / kRows;
    if (which < 4) {
      const std::int64_t array = which < 2 && !slots ? which : which + 2;
      copy4_async(
          constants + turn * 4 * kRows + thread,
          a.row_constants + (array * a.pairs + pair_number) * a.rows + min(number, a.rows - 1),
          which < 2 || number < a.rows);
    }
  };

  Tile tile;
#pragma unroll
  for (int n = 0; n < Tile::kWide * 8; ++n) {
    tile.dk[0][n / 8][n / 4 % 2][n % 4] = 0;
    tile.dv[0][n / 8][n / 4 % 2][n % 4] = 0;
  }
  T* my_k = k + warp * 16 * kSize;
  T* my_v = v + warp * 16 * kSize;
  const int key = keys.begin + warp * 16;
  read_range(end - 1);
  int j = next(end - 1), turn = 0;
  if (j >= begin) load(j, 0);
  commit_copies();
  read_range(j - 1);
  while (j >= begin) {
    wait_for_copies<0>();
    __syncthreads();  // these rows are there, and nobody reads the ones before them any more
    j = next(j - 1);
    if (j >= begin) load(j, turn ^ 1);
    commit_copies();
    read_range(j - 1);
    T* q = rows + turn * 2 * kRows * kSize;
    const int* here = constants + turn * 4 * kRows;
#pragma unroll 1
    for (int r = 0; r < kRows; r += Tile::kStep) {
      tile.add(a, my_k, my_v, q + r * kSize, q + (kRows + r) * kSize, here + r, key);
    }
    turn ^= 1;
  }
  wait_for_copies<0>();
  __syncthreads();  // for a tile that no row sees, its own copies are waited for here

  if (!slots && a.parts > 1) {
    const std::int64_t first =
        (static_cast<std::int64_t>(part) * a.pairs + pair_number) * a.text_length;
#pragma unroll
    for (int n = 0; n < Tile::kWide * 4; ++n) {
      const int r = n % 2 * 8 + lane / 4, d = n / 2 * 8 + lane % 4 * 2;
      if (key + r >= keys.end) continue;
      const std::int64_t at = (first + key + r) * kSize + d;
      if (Tile::kOfKeys) {
        const float* from = &tile.dk[0][n / 4][n / 2 % 2][n % 2 * 2];
        *reinterpret_cast<float2*>(a.dk_parts + at) = make_float2(from[0], from[1]);
      }
      if (Tile::kValues) {
        const float* from = &tile.dv[0][n / 4][n / 2 % 2][n % 2 * 2];
        *reinterpret_cast<float2*>(a.dv_parts + at) = make_float2(from[0], from[1]);
      }
    }
    return;
  }

  // The warp's own keys and values, which nobody reads any more, turn the rows into whole chunks.
#pragma unroll
  for (int n = 0; n < Tile::kWide * 4; ++n) {
    const int r = n % 2 * 8 + lane / 4, d = n / 2 * 8 + lane % 4 * 2;
    if (Tile::kOfKeys) {
      const float* from = &tile.dk[0][n / 4][n / 2 % 2][n % 2 * 2];
      put_two(in_tile<T, kSize>(my_k, r, d), from[0] * a.scale, from[1] * a.scale);
    }
    if (Tile::kValues) {
      const float* from = &tile.dv[0][n / 4][n / 2 % 2][n % 2 * 2];
      put_two(in_tile<T, kSize>(my_v, r, d), from[0], from[1]);
    }
  }
  __syncwarp();
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack;
#pragma unroll 4
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, d = i % kChunks * kPack;
    if (key + r >= keys.end || d >= a.size) continue;
    int column = 0, slot = key + r;
    if (slots) {
      column = (key + r) / a.slot_stride;
      slot = key + r - column * a.slot_stride;
      if (slot >= a.key_slots) continue;
    }
    const auto store = [&](const AttentionTensor& to, T* from) {
      store_chunk(element<T>(to, pair.batch, pair.kv_head, slot, column),
                  load16(in_tile<T, kSize>(from, r, d)), d, a.size, a.gradients_aligned);
    };
    if (Tile::kOfKeys) store(slots ? a.dk_thought : a.dk_text, my_k);
    if (Tile::kValues) store(slots ? a.dv_thought : a.dv_text, my_v);
  }
}

template <class T, int kSize, Pass kPass, bool kSmall>
void launch_key_gradients(const Arguments& a, const Device& device) {
  using Tile = KeyGradients<T, kSize, kPass, kSmall>;
  const std::int64_t text_tiles = ceil_div(a.text_length, Tile::kKeys) * a.parts;
  const std::int64_t slot_tiles = ceil_div(a.slot_keys, Tile::kKeys);
  launch("thought_attention_key_gradients", device, key_gradients_kernel<T, kSize, kPass, kSmall>,
         blocks((text_tiles + slot_tiles) * a.pairs), dim3(Tile::kThreads),
         key_gradient_bytes(sizeof(T), kSize, kSmall), a);
}

}  // namespace quietstar::cuda::attention
