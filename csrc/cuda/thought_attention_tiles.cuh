// Rows and keys of thought_attention on their way between memory and shared memory.
//
// Tiles are rows of kSize elements, in which the chunks of 16 bytes change places by the number of
// the row, so that eight rows of one column of chunks lie in different banks.
#pragma once

#include "thought_attention.cuh"

namespace quietstar::cuda::attention {

template <class T, int kSize>
__device__ __forceinline__ T* in_tile(T* tile, int row, int column) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack;
  static_assert(kChunks % 4 == 0, "chunks change places within groups of 4 or 8");
  const int swap = kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
  return tile + row * kSize + (column / kPack ^ swap) * kPack + column % kPack;
}

// in_tile(tile, row + down, column + right), where row and column, both below 16, are a thread's
// own and down and right, multiples of 16, are the same for all. Chunks change places without a
// carry then: a step to the right is one operation on a place that is computed once, a step down
// none.
template <class T, int kSize>
__device__ __forceinline__ T* in_tile_beside(T* tile, int row, int column, int down, int right) {
  constexpr int kPack = Pack<T>::size, kBytes = static_cast<int>(sizeof(T));
  const int swap = kSize / kPack % 8 == 0 ? row & 7 : row >> 1 & 3;
  const int place = (column / kPack ^ swap) * 16 + column % kPack * kBytes;
  auto* at = reinterpret_cast<unsigned char*>(tile + row * kSize) + (place ^ right * kBytes);
  return reinterpret_cast<T*>(at) + down * kSize;
}

// Elements d .. of a row of `size` to a chunk of a tile; zeros from `size` on, or where the row
// does not exist (then `row` is still an address that can be read).
template <class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* row, int d, int size, bool exists,
                                           bool aligned) {
  const bool valid = exists && d < size;
  if (aligned) {
    copy16_async(to, row + (valid ? d : 0), valid);
    return;
  }
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    pack.at[i] = valid && d + i < size ? row[d + i] : T{};
  }
  store16(to, pack);
}

// Rows of a pair in a tensor like q, from element d on: what they share is added up once.
template <class T>
struct RowsOfPair {
  AttentionTensor from;

  __device__ __forceinline__ RowsOfPair(const Arguments& a, const Pair& pair,
                                        const AttentionTensor& t, int d)
      : from(t) {
    from.data = element<std::remove_const_t<T>>(t, pair.batch, pair.kv_head * a.groups, 0, 0) + d;
  }
  __device__ __forceinline__ T* row(const Arguments& a, int number) const {
    return element<T>(from, Pair{0, 0}, row_of(a, Pair{0, 0}, number));
  }
};

// The rows [first, first + kRows) of a pair, of a tensor like q, by all threads of the block.
template <class T, int kSize, int kRows, int kThreads>
__device__ __forceinline__ void load_rows(const Arguments& a, const Pair& pair,
                                          const AttentionTensor& from, int first, T* tile,
                                          bool aligned) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack, kStep = kThreads / kChunks;
  // Where the threads make whole rows, a thread has the same chunk of each of its rows.
  if constexpr (kThreads % kChunks == 0 && kRows % kStep == 0) {
    if (aligned) {
      const int r = static_cast<int>(threadIdx.x) / kChunks;
      const int d = static_cast<int>(threadIdx.x) % kChunks * kPack;
      const bool in_row = d < a.size;
      const RowsOfPair<const T> rows(a, pair, from, in_row ? d : 0);
#pragma unroll
      for (int i = 0; i < kRows; i += kStep) {
        const int number = first + r + i;
        // Nothing is read of a row that is not there: not even its address is looked at.
        copy16_async(in_tile<T, kSize>(tile, r + i, d), rows.row(a, number),
                     in_row && number < a.rows);
      }
      return;
    }
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, d = i % kChunks * kPack;
    const bool exists = first + r < a.rows;
    const Row row = row_of(a, pair, exists ? first + r : 0);
    copy_chunk(in_tile<T, kSize>(tile, r, d), element<const T>(from, pair, row), d, a.size, exists,
               aligned);
  }
}

// Which keys a tile holds: kKeys of the text or of the slots, from `begin` on, those below `end`.
struct KeyTile {
  bool slots;
  int begin, end;
};

// A tile of keys or values, by all threads of the block.
template <class T, int kSize, int kKeys, int kThreads>
__device__ __forceinline__ void load_keys(const Arguments& a, const Pair& pair,
                                          const AttentionTensor& text,
                                          const AttentionTensor& thought, const KeyTile& keys,
                                          T* tile) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack, kStep = kThreads / kChunks;
  // As in load_rows. Addresses of text keys are a fixed step apart, so that they are computed once
  // a tile.
  if constexpr (kThreads % kChunks == 0 && kKeys % kStep == 0) {
    if (a.keys_aligned) {
      const int r = static_cast<int>(threadIdx.x) / kChunks;
      const int d = static_cast<int>(threadIdx.x) % kChunks * kPack;
      const bool in_row = d < a.size;
      const int left = in_row ? keys.end - keys.begin - r : 0;
      if (!keys.slots) {
        const T* from = element<const T>(text, pair.batch, pair.kv_head, keys.begin + r, 0);
        if (in_row) from += d;
#pragma unroll
        for (int i = 0; i < kKeys; i += kStep) {
          copy16_async(in_tile<T, kSize>(tile, r + i, d), from + i * text.slot, i < left);
        }
        return;
      }
      AttentionTensor slots = thought;
      slots.data = element<T>(thought, pair.batch, pair.kv_head, 0, 0) + (in_row ? d : 0);
#pragma unroll
      for (int i = 0; i < kKeys; i += kStep) {
        const int key = keys.begin + r + i;
        const auto column = static_cast<int>(a.by_slot_stride.divide(static_cast<unsigned>(key)));
        const int slot = key - column * a.slot_stride;
        copy16_async(in_tile<T, kSize>(tile, r + i, d), element<const T>(slots, 0, 0, slot, column),
                     i < left && slot < a.key_slots);
      }
      return;
    }
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kKeys * kChunks; i += kThreads) {
    const int r = i / kChunks, d = i % kChunks * kPack, key = keys.begin + r;
    bool exists = key < keys.end;
    const T* row;
    if (keys.slots) {
      const int column =
          exists ? static_cast<int>(a.by_slot_stride.divide(static_cast<unsigned>(key))) : 0;
      const int slot = exists ? key - column * a.slot_stride : 0;
      exists = exists && slot < a.key_slots;
      row = element<const T>(thought, pair.batch, pair.kv_head, exists ? slot : 0, column);
    } else {
      row = element<const T>(text, pair.batch, pair.kv_head, exists ? key : 0, 0);
    }
    copy_chunk(in_tile<T, kSize>(tile, r, d), row, d, a.size, exists, a.keys_aligned);
  }
}

// Chunk d of a tile's row to memory, as far as the row goes.
template <class T>
__device__ __forceinline__ void store_chunk(T* row, const Pack<T>& pack, int d, int size,
                                            bool aligned) {
  if (aligned && d + Pack<T>::size <= size) {
    store16_global(row + d, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    if (d + i < size) row[d + i] = pack.at[i];
  }
}

// Rows of a warp's tile to memory.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void store_rows(const Arguments& a, const Pair& pair,
                                           const AttentionTensor& to, int first, T* tile,
                                           bool aligned) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (32 % kChunks == 0) {
    if (aligned) {
      const int d = lane % kChunks * kPack;
      if (d >= a.size) return;
      const RowsOfPair<T> rows(a, pair, to, d);
#pragma unroll 4
      for (int r = lane / kChunks; r < kRows; r += 32 / kChunks) {
        if (first + r >= a.rows) return;
        store16_global(rows.row(a, first + r), load16(in_tile<T, kSize>(tile, r, d)));
      }
      return;
    }
  }
#pragma unroll 1
  for (int i = lane; i < kRows * kChunks; i += 32) {
    const int r = i / kChunks, d = i % kChunks * kPack;
    if (first + r >= a.rows || d >= a.size) continue;
    store_chunk(element<T>(to, pair, row_of(a, pair, first + r)),
                load16(in_tile<T, kSize>(tile, r, d)), d, a.size, aligned);
  }
}

// Two numbers side by side in a tile.
template <class T>
__device__ __forceinline__ void put_two(T* at, float first, float second) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(at) = make_float2(first, second);
  } else {
    *reinterpret_cast<unsigned*>(at) = pack2<T>(first, second);
  }
}

}  // namespace quietstar::cuda::attention
