// Second kernel of thought_attention's backward pass: the gradients of the text's keys and values.
// Per row and key, with p and ds as in thought_attention_row_gradients.cuh,
//   dv += p dout,   dk += scale ds q.
// Those of the slots are another kernel's (thought_attention_slot_gradients.cuh).
//
// A block takes a tile of keys, 16 of them a warp, and walks over the rows that see them, some at a
// time in two turns. A warp multiplies its keys with the rows, so that the results stand as keys x
// rows and go on as left operands without leaving their registers, and sums dk and dv in registers:
// no atomics. Steps of rows that do not see the warp's keys are passed over.
//
// Rows that see a tile of text are found by block_ranges: for every block of rows the first and the
// last key that one of them sees. With columns in the order of their anchors they are one stretch;
// in any order they lie somewhere in it and the others are passed over. Where there are too few
// tiles for the device, the stretch is cut into parts, summed apart in fp32 and added up in their
// order by reduce_parts_kernel.
//
// Head sizes beyond 128 leave no room for both sums: one launch for the values, one for the keys.
//
// Bytes from memory: per tile of keys, q and dout of the rows that see it (from L2 mostly: tiles of
// one head run at the same time), 8 D per key and part. Operations: 8 D and one exponential per row
// and key (beyond 128: 10 D).
#pragma once

#include "thought_attention_key_weights.cuh"

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
  __device__ __forceinline__ void add(const Arguments& a, T* k, T* v, T* q, T* dout,
                                      const RowConstants<kRows>& rows, int key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Range seen = rows.range(lane % kStep);
    if (!__any_sync(kAllLanes, seen.first < key + 16 && seen.last > key)) return;
    const bool masked = !__all_sync(kAllLanes, seen.first <= key && seen.last >= key + 16);
    KeyWeights<T, kSize, kGroups, kOfKeys> weights;
    weights.weigh(a, k, q, rows);
    if (masked) weights.mask(rows, key);
    if (kValues) add_weighted<kSize, false>(dv, weights.p, dout, 0, a.precise);
    if (!kOfKeys) return;
    weights.differentiate(a, v, dout, rows);
    add_weighted<kSize, false>(dk, weights.ds, q, 0, a.precise);
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

  // Tiles that most rows see come before the others.
  const int pair_number = static_cast<int>(blockIdx.x) % a.pairs;
  const Pair pair = pair_of(a, pair_number);
  int block = static_cast<int>(blockIdx.x) / a.pairs;
  const int part = block % a.parts, begin_key = block / a.parts * kKeys;
  const KeyTile keys{false, begin_key, min(begin_key + kKeys, a.text_length)};

  load_keys<T, kSize, kKeys, kThreads>(a, pair, a.k_text, a.k_thought, keys, k);
  load_keys<T, kSize, kKeys, kThreads>(a, pair, a.v_text, a.v_thought, keys, v);

  const int2* ranges = a.block_ranges + static_cast<std::int64_t>(pair.batch) * a.row_blocks;
  int begin = 0, end = 0;  // blocks of rows
  const Range all =
      blocks_that_see(ranges, a.row_blocks, keys.begin, keys.end, kThreads, constants);
  if (all.first < all.last) {
    begin = all.first + (all.last - all.first) * part / a.parts;
    end = all.first + (all.last - all.first) * (part + 1) / a.parts;
  }
  // What the loop asks about the next block of rows was read a round before.
  int2 range{};
  const auto read_range = [&](int j) {
    if (j >= begin) range = ranges[j];
  };
  // From the last rows to the first: a causal mask lets the last ones see every tile, so the tiles
  // of a head begin with the same rows and read them from L2.
  const auto next = [&](int j) {
    while (j >= begin && !(range.x < keys.end && range.y > keys.begin)) read_range(--j);
    return j;
  };
  const auto load = [&](int j, int turn) {
    T* to = rows + turn * 2 * kRows * kSize;
    const int first = j * kRows, number = first + thread % kRows;
    load_rows<T, kSize, kRows, kThreads>(a, pair, a.q, first, to, a.q_aligned);
    load_rows<T, kSize, kRows, kThreads>(a, pair, a.dout, first, to + kRows * kSize,
                                         a.dout_aligned);
    // A thread fetches one constant: first, last, lse or delta of a row. Rows past the end see what
    // the last one sees, and as zeros contribute nothing.
    const int which = thread / kRows;
    if (which < 4) {
      const std::int64_t array = which < 2 ? which : which + 2;
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
      tile.add(a, my_k, my_v, q + r * kSize, q + (kRows + r) * kSize, {here + r}, key);
    }
    turn ^= 1;
  }
  wait_for_copies<0>();
  __syncthreads();  // for a tile that no row sees, its own copies are waited for here

  if (a.parts > 1) {
    keep(block);  // which part it is, no register holds through the loop
    const std::int64_t first =
        (static_cast<std::int64_t>(block % a.parts) * a.pairs + pair_number) * a.text_length;
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
    const auto store = [&](const AttentionTensor& to, T* from) {
      store_chunk(element<T>(to, pair.batch, pair.kv_head, key + r, 0),
                  load16(in_tile<T, kSize>(from, r, d)), d, a.size, a.gradients_aligned);
    };
    if (Tile::kOfKeys) store(a.dk_text, my_k);
    if (Tile::kValues) store(a.dv_text, my_v);
  }
}

template <class T, int kSize, Pass kPass, bool kSmall>
void launch_key_gradients(const Arguments& a, const Device& device) {
  using Tile = KeyGradients<T, kSize, kPass, kSmall>;
  launch("thought_attention_key_gradients", device, key_gradients_kernel<T, kSize, kPass, kSmall>,
         blocks(ceil_div(a.text_length, Tile::kKeys) * a.parts * a.pairs), dim3(Tile::kThreads),
         key_gradient_bytes(sizeof(T), kSize, kSmall), a);
}

}  // namespace quietstar::cuda::attention
