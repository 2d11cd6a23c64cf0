// Third kernel of thought_attention's backward pass: the gradients of the slots' keys and values.
// Per row and key, with p and ds as in thought_attention_row_gradients.cuh,
//   dv += p dout,   dk += scale ds q.
//
// A block takes 16 slot keys, which are one column's where columns have at least 16 rows, and the
// rows of their columns: in 16 bits 32 a warp at once, so that a column of 15 slots and 4 heads is
// one round of 2 warps, and all that a block reads is under way at once. A warp computes p and ds
// of the keys and its rows and leaves them in shared memory; then a warp sums dv and another one
// dk over the rows of both (in fp32 more warps take a half each), in registers and in the order of
// the rows: no atomics. So no warp waits for rows of other columns, and several blocks on a
// multiprocessor hide each other's waiting for memory.
//
// Bytes from memory: q and dout of a column once per 16 keys of it; keys, values and their
// gradients once. Operations: 8 D and one exponential per row and key.
#pragma once

#include <algorithm>

#include "thought_attention_key_weights.cuh"

namespace quietstar::cuda::attention {

// Where 16 rows of two tensors lie, an address a lane, so that each is computed once: lanes 0 .. 15
// have the rows of the one, lanes 16 .. 31 those of the other.
template <class T>
struct RowAddresses {
  T* mine;
  unsigned exist;  // a bit a lane

  __device__ __forceinline__ T* of(int lane) const {
    return reinterpret_cast<T*>(
        __shfl_sync(kAllLanes, reinterpret_cast<std::uintptr_t>(mine), lane));
  }
};

template <class T>
__device__ __forceinline__ RowAddresses<T> row_addresses(const AttentionTensor& one,
                                                         const AttentionTensor& other,
                                                         const Pair& pair, const Row& row,
                                                         bool exists) {
  const bool low = threadIdx.x % 32 < 16;
  const AttentionTensor t{low ? one.data : other.data, low ? one.batch : other.batch,
                          low ? one.head : other.head, low ? one.slot : other.slot,
                          low ? one.column : other.column};
  return {element<T>(t, pair, row), __ballot_sync(kAllLanes, exists)};
}

// Calls use(r, below, d, place) for each piece of 16 bytes that a lane has of kRows x kColumns
// elements of a tile, from `column` on: of row r + below, where r is the same for all pieces if
// kUnrolled; its first column, and where it is. All lanes have as many.
template <class T, int kSize, int kRows, int kColumns, bool kUnrolled, class Use>
__device__ __forceinline__ void each_piece(T* tile, int column, const Use& use) {
  constexpr int kPack = Pack<T>::size, kChunks = kColumns / kPack, kPieces = kRows * kChunks / 32;
  static_assert(kRows * kChunks % 32 == 0, "all lanes take part in every shuffle");
  if constexpr (kUnrolled && 32 % kChunks == 0 && kSize / kPack % 8 == 0) {
    constexpr int kStep = 32 / kChunks;
    const int r = static_cast<int>(threadIdx.x % 32u / kChunks);
    const int d = column + static_cast<int>(threadIdx.x % kChunks) * kPack;
    const int place = (d / kPack ^ (r & 7)) * 16;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      // A row below kStep and a multiple of it add up without a carry.
      auto* at =
          reinterpret_cast<unsigned char*>(tile + r * kSize) + (place ^ (i * kStep & 7) * 16);
      use(r, i * kStep, d, reinterpret_cast<T*>(at) + i * kStep * kSize);
    }
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x % 32u); i < kRows * kChunks; i += 32) {
      const int r = i / kChunks, d = column + i % kChunks * kPack;
      use(r, 0, d, in_tile<T, kSize>(tile, r, d));
    }
  }
}

// The rows of lanes first .. first + kRows - 1 to a tile, by a whole warp.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void fetch_rows(const RowAddresses<const T>& from, int first, T* tile,
                                           int size, bool aligned) {
  if (aligned) {
    each_piece<T, kSize, kRows, kSize, true>(tile, 0, [&](int r, int below, int d, T* place) {
      const unsigned exist = d < size ? from.exist >> (first + r) : 0;
      copy16_async(place, from.of(first + r + below) + d, exist >> below & 1);
    });
    return;
  }
  each_piece<T, kSize, kRows, kSize, false>(tile, 0, [&](int r, int, int d, T* place) {
    const T* row = from.of(first + r);
    copy_chunk(place, row, d, size, from.exist >> (first + r) & 1, false);
  });
}

// Columns of a tile of 16 rows to those of lanes first .. first + 15.
template <class T, int kSize, int kColumns>
__device__ __forceinline__ void store_rows_of_lanes(const RowAddresses<T>& to, int first, T* tile,
                                                    int column, int size, bool aligned) {
  if (aligned) {
    each_piece<T, kSize, 16, kColumns, true>(tile, column, [&](int r, int below, int d, T* place) {
      const unsigned exist = d < size ? to.exist >> (first + r) : 0;
      T* row = to.of(first + r + below);
      if (exist >> below & 1) store16_global(row + d, load16(place));
    });
    return;
  }
  each_piece<T, kSize, 16, kColumns, false>(tile, column, [&](int r, int, int d, T* place) {
    T* row = to.of(first + r);
    if (to.exist >> (first + r) & 1) store_chunk(row, load16(place), d, size, false);
  });
}

template <class T, int kSize>
struct SlotGradients {
  static constexpr SlotShape kShape = slot_gradient_shape(sizeof(T), kSize);
  // There are as many shares as warps at most: dv and dk, or of each the halves.
  static constexpr int kShares = kShape.warps, kThreads = kShape.threads();
  static constexpr int kGroups = kShape.row_tiles, kRows = kShape.rows();
  static constexpr int kColumns = 2 * kSize / kShares, kWide = kColumns / 16;
  static constexpr int kWeights = 16 * kRows;  // of a warp: of p, and as many of ds
  static_assert(4 * kRows * sizeof(int) <= 2 * kWeights * sizeof(T), "what knows of rows fits");
  // To a multiprocessor, as far as its shared memory goes.
  static constexpr int kBlocks = sizeof(T) == 4 || kSize > 128 ? 2
                                 : kSize > 96                  ? 5
                                 : kSize > 64                  ? 6
                                                               : 8;

  float sums[1][kWide][2][4];

  static __device__ __forceinline__ bool of_keys(int share) { return share % 2 == 1; }
  static __device__ __forceinline__ int column(int share) {
    return kColumns == kSize ? 0 : share / 2 * kColumns;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kWide * 8; ++n) sums[0][n / 8][n / 4 % 2][n % 4] = 0;
  }
  // Adds to a share what `tiles` times 16 rows contribute. weights: [warps][p, ds][16 keys][kRows];
  // rows: [q, dout][warps][kRows][kSize].
  __device__ __forceinline__ void add(int share, int tiles, T* weights, T* rows, int warps,
                                      bool precise) {
    T* of = weights + (of_keys(share) ? kWeights : 0);
    T* from = rows + (of_keys(share) ? 0 : warps * kRows * kSize);
    constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;
#pragma unroll kUnroll
    for (int tile = 0; tile < tiles; ++tile) {
      const Left<T> left =
          left_of_tile<kRows>(of + tile / kGroups * 2 * kWeights, 0, tile % kGroups * 16);
#pragma unroll
      for (int n = 0; n < kWide; ++n) {
        multiply(sums[0][n], left,
                 right_of_columns<kSize>(from + tile * 16 * kSize, 0, column(share) + n * 16),
                 precise);
      }
    }
  }
  // The sums into columns of a tile of 16 keys.
  __device__ __forceinline__ void put(int share, T* tile, float scale) {
    const int lane = static_cast<int>(threadIdx.x % 32u);
    if (of_keys(share)) {
#pragma unroll
      for (int n = 0; n < kWide * 8; ++n) sums[0][n / 8][n / 4 % 2][n % 4] *= scale;
    }
#pragma unroll
    for (int n = 0; n < kWide * 4; ++n) {
      const float* from = &sums[0][n / 4][n / 2 % 2][n % 2 * 2];
      put_two(in_tile_beside<T, kSize>(tile, n % 2 * 8 + lane / 4, n / 2 % 2 * 8 + lane % 4 * 2, 0,
                                       column(share) + n / 4 * 16),
              from[0], from[1]);
    }
  }
};

template <class T, int kSize>
__global__ void __launch_bounds__(SlotGradients<T, kSize>::kThreads,
                                  SlotGradients<T, kSize>::kBlocks)
    slot_gradients_kernel(const Arguments a) {
  using Shares = SlotGradients<T, kSize>;
  constexpr int kRows = Shares::kRows, kOfRows = kRows * kSize, kWeights = Shares::kWeights;
  QUIETSTAR_DYNAMIC_SHARED(memory);
  const int warp = static_cast<int>(threadIdx.x / 32u), lane = static_cast<int>(threadIdx.x % 32u);
  const int warps = static_cast<int>(blockDim.x / 32u);
  T* k = reinterpret_cast<T*>(memory);
  T* v = k + 16 * kSize;
  T* rows = v + 16 * kSize;                 // [q, dout][warps][kRows][kSize]
  T* weights = rows + 2 * warps * kOfRows;  // [warps][p, ds][16][kRows]
  T *q = rows + warp * kOfRows, *dout = q + warps * kOfRows, *own = weights + warp * 2 * kWeights;
  // What is known of the warp's rows lies where their weights come afterwards.
  int* constants = reinterpret_cast<int*>(own);

  const auto group = static_cast<int>(a.by_pairs.divide(blockIdx.x)), key = group * 16;
  const int pair_number = static_cast<int>(blockIdx.x) - group * a.pairs;
  const auto batch = static_cast<int>(a.by_kv_heads.divide(static_cast<unsigned>(pair_number)));
  const Pair pair{batch, pair_number - batch * a.kv_heads};
  const auto column_of = [&](int n) {
    return static_cast<int>(a.by_slot_stride.divide(static_cast<unsigned>(n)));
  };
  const auto slot_of = [&](int n) { return n - column_of(n) * a.slot_stride; };
  const int my_key = key + lane % 16;
  const Row key_row{column_of(my_key), slot_of(my_key), pair.kv_head};
  const bool key_exists = my_key < a.slot_keys && key_row.slot < a.key_slots;
  {
    const auto keys = row_addresses<const T>(a.k_thought, a.v_thought, pair, key_row, key_exists);
    // A warp fetches some keys or values at a time.
    constexpr int kAtOnce = 32 / Shares::kShares;
#pragma unroll 1
    for (int i = warp; i < Shares::kShares; i += warps) {
      const int first = i / 2 * kAtOnce;
      fetch_rows<T, kSize, kAtOnce>(keys, i % 2 * 16 + first, (i % 2 == 0 ? k : v) + first * kSize,
                                    a.size, a.keys_aligned);
    }
    commit_copies();
  }

  // Rows begin .. end - 1 are those of the keys' columns, but for the slots of the first column
  // that come before its first key here.
  const int column_rows = a.query_slots * a.groups;
  const int first_slot = max(slot_of(key) - (a.key_slots - a.query_slots), 0);
  const int begin = column_of(key) * column_rows + first_slot * a.groups;
  const int end = (column_of(min(key + 16, a.slot_keys) - 1) + 1) * column_rows;

  Shares shares;
  shares.clear();
  int tiles = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += warps * kRows) {
    if (first != begin) __syncthreads();  // the rows before these have been read, and their weights
    const int my_first = first + warp * kRows;
    tiles = min(warps * Shares::kGroups, (end - first + 15) / 16);
    if (my_first < end) {
#pragma unroll
      for (int tile = 0; tile < kRows; tile += 16) {
        const int row = my_first + tile + lane % 16;
        const auto from =
            row_addresses<const T>(a.q, a.dout, pair, row_of(a, pair, row), row < end);
        fetch_rows<T, kSize, 16>(from, 0, q + tile * kSize, a.size, a.q_aligned);
        fetch_rows<T, kSize, 16>(from, 16, dout + tile * kSize, a.size, a.dout_aligned);
      }
      // First and last slot key, lse and delta of the rows. A row past the end is zeros and sees no
      // key.
      const std::int64_t all = static_cast<std::int64_t>(a.pairs) * a.rows;
      const int row = my_first + lane % kRows;
      const int* of_row = a.row_constants + static_cast<std::int64_t>(pair_number) * a.rows + row +
                          (lane < kRows ? 2 : 3) * all;
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        copy4_async(constants + i * 32 + lane, of_row + i * (32 / kRows) * all, row < end);
      }
    }
    commit_copies();
    wait_for_copies<0>();
    if (first == begin) {
      __syncthreads();  // keys and values of all warps are there
    } else {
      __syncwarp();
    }
    if (my_first < end) {
      const RowConstants<kRows> of_rows{constants};
      KeyWeights<T, kSize, Shares::kGroups> mine;
      mine.weigh(a, k, q, of_rows);
      mine.mask(of_rows, key);
      mine.differentiate(a, v, dout, of_rows);
      __syncwarp();  // the constants have been read
#pragma unroll
      for (int i = 0; i < Shares::kGroups * 8; ++i) {
        const int tile = i / 8, half = i / 2 % 2, at = i % 2 * 2;
        const float* from = i / 4 % 2 ? &mine.ds[0][tile][half][at] : &mine.p[0][tile][half][at];
        put_two(in_tile_beside<T, kRows>(own + i / 4 % 2 * kWeights, i % 2 * 8 + lane / 4,
                                         half * 8 + lane % 4 * 2, 0, tile * 16),
                from[0], from[1]);
      }
    }
    __syncthreads();  // the weights of all warps are there
    shares.add(warp, tiles, weights, rows, warps, a.precise);
  }
  if (tiles == 0) {  // keys without rows: their copies end before they are written over
    wait_for_copies<0>();
    __syncthreads();
  }

  // Keys and values, which nobody reads any more, turn the sums into whole chunks. A block of fewer
  // warps than shares has had all its rows at once: they are still there.
  const auto to = row_addresses<T>(a.dk_thought, a.dv_thought, pair, key_row, key_exists);
  for (int share = warp;;) {
    T* tile = Shares::of_keys(share) ? k : v;
    shares.put(share, tile, a.scale);
    __syncwarp();
    store_rows_of_lanes<T, kSize, Shares::kColumns>(to, Shares::of_keys(share) ? 0 : 16, tile,
                                                    Shares::column(share), a.size,
                                                    a.gradients_aligned);
    share += warps;
    if (share >= Shares::kShares) return;
    shares.clear();
    shares.add(share, tiles, weights, rows, warps, a.precise);
  }
}

template <class T, int kSize>
void launch_slot_gradients(const Arguments& a, const Device& device) {
  using Shares = SlotGradients<T, kSize>;
  // Columns that 16 keys may be of. Fewer warps than the most have all rows at once.
  const int stride = a.slot_stride, columns = stride % 16 == 0 ? 1 : (15 + stride - 1) / stride + 1;
  const std::int64_t rows = std::int64_t{columns} * a.query_slots * a.groups;
  const int warps =
      static_cast<int>(std::clamp<std::int64_t>(ceil_div(rows, Shares::kRows), 1, Shares::kShares));
  launch("thought_attention_slot_gradients", device, slot_gradients_kernel<T, kSize>,
         blocks(ceil_div(a.slot_keys, 16) * a.pairs), dim3(warps * 32),
         slot_gradient_bytes(sizeof(T), kSize, warps), a);
}

}  // namespace quietstar::cuda::attention
