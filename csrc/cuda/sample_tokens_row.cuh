// A row of logits as the warps of sample_tokens read it: in chunks of 4 x 16 bytes per lane, with
// minus infinity where a chunk reaches over an end of the row and in place of banned ids.
//
// Chunks begin at multiples of 16 bytes, whatever the address of the row: the row's first element
// is number `lead` of chunk 0. Only the packs that a row's ends cut are read one element at a time.
#pragma once

#include <cstring>
#include <limits>

#include "arch.cuh"
#include "quietstar/sample_tokens.h"
#include "reduce.cuh"

namespace quietstar::cuda::sampling {

constexpr int kPacks = 4;
template <class T>
constexpr int kChunk = 32 * kPacks * Pack<T>::size;  // elements

constexpr int kMaxEntries = 512;  // sums kept per row; an entry is one chunk or several
constexpr int kFewBanned = 64;    // up to so many ids are compared, more need a bitmap
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // below it there is only -inf

// What a launch needs to know; the same for all rows.
struct Options {
  const void* logits;
  std::int64_t vocab, row_stride;
  double factor;            // log2(e) / temperature
  double reach;             // 100 octaves of the result, in logits
  float hi, lo;             // the factor as a sum
  float below_hi, above_0;  // the same as a sum whose second part is positive
  float gain, cap;          // logit = x gain; with a cap, cap tanh(a) where e^(2 a) = 2^(x gain)
  bool transformed;         // gain or cap change something
  bool greedy;
  bool truncated;      // by top_k, top_p or min_p
  bool first_sums;     // the first pass has to add up, too
  bool fast;           // and may do so approximately
  std::int64_t top_k;  // 0 where it keeps all
  double top_p;
  double min_p_shift;  // temperature * log(min_p), -inf for none
  double unit;         // 2^0 in the fixed-point sums of top_p
  const std::int64_t* banned;
  int banned_count;             // of `banned`; 0 where there is a bitmap
  const unsigned* banned_bits;  // [ceil(vocab / 32)] or null
  const std::int64_t* seed;
  std::uint64_t offset;
  std::int64_t* tokens;
  float* logprobs;
  int per_entry;    // chunks
  int max_entries;  // of any row, at most kMaxEntries
  int per_block;    // entries of a block where the first pass is a launch of its own
  // [rows, max_entries] each, where the first pass is a launch of its own, else null: exact sums or
  // fast ones.
  double* sums;
  float *fast_sums, *maxima;
  // Of the fast kernels:
  int rows;
  int row_shift;  // 2^row_shift warps of a block work on one row
};

template <class T>
struct Row {
  const T* data;
  int lead;          // place of the first element in chunk 0
  std::int64_t end;  // place after the last one
  int chunks, entries;
  float origin;       // subtracted from every logit
  const int* banned;  // [kFewBanned] in shared memory; -1 for none
};

// What a lane holds of a chunk, as it lies in memory: element k of pack i is number i * size + k.
// Words, because the compiler would keep every 16-bit number in a register of its own.
template <class T>
struct Chunk {
  static constexpr int count = kPacks * Pack<T>::size;  // 16 or 32 elements
  unsigned word[kPacks * 4];
};

// The number j as a float.
template <class T>
__device__ __forceinline__ float element(const Chunk<T>& chunk, int j) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(chunk.word[j]);
  } else {
    return number_in<T>(chunk.word[j / 2], j % 2);
  }
}

template <class T>
__device__ __forceinline__ unsigned bits_of(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(x);
  } else {
    return x.bits;
  }
}
template <class T>
__device__ __forceinline__ void set_element(Chunk<T>& chunk, int j, unsigned bits) {
  if constexpr (sizeof(T) == 4) {
    chunk.word[j] = bits;
  } else {
    const unsigned shift = j % 2 * 16;
    chunk.word[j / 2] = (chunk.word[j / 2] & ~(0xffffu << shift)) | bits << shift;
  }
}

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x % 32);
}

template <class T>
__device__ __forceinline__ Row<T> row_of(const Options& o, std::int64_t n, const int* banned) {
  Row<T> row;
  row.data = static_cast<const T*>(o.logits) + n * o.row_stride;
  row.lead = static_cast<int>((reinterpret_cast<std::uintptr_t>(row.data) & 15) / sizeof(T));
  row.end = row.lead + o.vocab;
  row.chunks = static_cast<int>((row.end + kChunk<T> - 1) / kChunk<T>);
  // A division is some hundred cycles, before the first load.
  row.entries = o.per_entry == 1 ? row.chunks : (row.chunks + o.per_entry - 1) / o.per_entry;
  row.origin = 0;
  row.banned = banned;
  return row;
}

// Brings the ids to shared memory, where there are few. Every thread of the block calls it,
// kFewBanned at least.
__device__ __forceinline__ void load_banned(const Options& o, int* banned) {
  if (o.banned_count == 0) return;
  const int i = static_cast<int>(threadIdx.x);
  if (i < kFewBanned) {
    const std::int64_t id = i < o.banned_count ? o.banned[i] : -1;
    banned[i] = id >= 0 && id < o.vocab ? static_cast<int>(id) : -1;
  }
  __syncthreads();
}

// Place, within its chunk, of a lane's element number j.
template <class T>
__device__ __forceinline__ int place_in_chunk(int j) {
  constexpr int kSize = Pack<T>::size;
  return (j / kSize * 32 + lane_id()) * kSize + j % kSize;
}

template <class T>
__device__ __forceinline__ void set_pack(Chunk<T>& chunk, int i, const Pack<unsigned>& pack) {
#pragma unroll
  for (int w = 0; w < 4; ++w) chunk.word[i * 4 + w] = pack.at[w];
}

// Whether all of a chunk lies inside the row.
template <class T>
__device__ __forceinline__ bool is_whole(const Row<T>& row, int number) {
  const std::int64_t base = static_cast<std::int64_t>(number) * kChunk<T>;
  return base >= row.lead && base + kChunk<T> <= row.end;
}

// This lane's first words of a chunk that is whole.
template <class T>
__device__ __forceinline__ const unsigned* words_of(const Row<T>& row, int number) {
  const std::int64_t base = static_cast<std::int64_t>(number) * kChunk<T>;
  return reinterpret_cast<const unsigned*>(row.data + (base - row.lead)) + lane_id() * 4;
}

// A chunk that an end of the row cuts.
template <class T>
__device__ __forceinline__ void load_cut_chunk(Chunk<T>& chunk, const Row<T>& row, int number) {
  constexpr int kSize = Pack<T>::size;
  const std::int64_t base = static_cast<std::int64_t>(number) * kChunk<T>;
  const unsigned missing = bits_of(from_float<T>(-kInf));
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const std::int64_t first = base + place_in_chunk<T>(i * kSize);
    const T* p = row.data + (first - row.lead);
    if (first >= row.lead && first + kSize <= row.end) {
      set_pack(chunk, i, load16(reinterpret_cast<const unsigned*>(p)));
      continue;
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const bool inside = first + k >= row.lead && first + k < row.end;
      set_element(chunk, i * kSize + k, inside ? bits_of(p[k]) : missing);
    }
  }
}

template <class T>
__device__ __forceinline__ void load_chunk(Chunk<T>& chunk, const Row<T>& row, int number,
                                           bool once) {
  if (!is_whole(row, number)) return load_cut_chunk(chunk, row, number);
  const unsigned* const p = words_of(row, number);
  if (once) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) set_pack(chunk, i, load16_once(p + i * 128));
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) set_pack(chunk, i, load16(p + i * 128));
  }
}

// Which elements of this lane a bitmap bans, as bits.
template <class T>
__device__ __forceinline__ unsigned banned_by_bits(const unsigned* bits, std::int64_t vocab,
                                                   std::int64_t first_id) {
  unsigned found = 0;
#pragma unroll 1
  for (int j = 0; j < Chunk<T>::count; ++j) {
    const std::int64_t id = first_id + place_in_chunk<T>(j);
    if (id >= 0 && id < vocab && (bits[id / 32] >> (id % 32) & 1)) found |= 1u << j;
  }
  return found;
}

// Takes the banned ids out of a chunk. The whole warp calls it.
template <class T>
__device__ __forceinline__ void ban(Chunk<T>& chunk, const Options& o, const Row<T>& row,
                                    int number) {
  if (o.banned_count == 0 && o.banned_bits == nullptr) return;
  constexpr int kSize = Pack<T>::size;
  const std::int64_t first_id = static_cast<std::int64_t>(number) * kChunk<T> - row.lead;
  unsigned found = 0;
  if (o.banned_bits) {
    const std::int64_t words = (o.vocab + 31) / 32;
    const std::int64_t word = (first_id > 0 ? first_id : 0) / 32 + lane_id();
    unsigned any = word < words ? o.banned_bits[word] : 0;
    // 1024 bits that begin inside a word reach into one more.
    if (lane_id() == 0 && word + 32 < words) any |= o.banned_bits[word + 32];
    if (!__any_sync(kAllLanes, any != 0)) return;
    found = banned_by_bits<T>(o.banned_bits, o.vocab, first_id);
  } else {
#pragma unroll
    for (int half = 0; half < kFewBanned; half += 32) {
      if (half >= o.banned_count) break;
      const int id = row.banned[half + lane_id()];
      const std::int64_t place = id - first_id;
      const bool here = id >= 0 && place >= 0 && place < kChunk<T>;
      for (unsigned hits = __ballot_sync(kAllLanes, here); hits != 0; hits &= hits - 1) {
        const int at =
            __shfl_sync(kAllLanes, static_cast<int>(place), __ffs(static_cast<int>(hits)) - 1);
        if (at / kSize % 32 == lane_id()) found |= 1u << (at / (32 * kSize) * kSize + at % kSize);
      }
    }
  }
  if (found == 0) return;
  const unsigned missing = bits_of(from_float<T>(-kInf));
#pragma unroll
  for (int j = 0; j < Chunk<T>::count; ++j) {
    if (found >> j & 1) set_element(chunk, j, missing);
  }
}

// The logit that an element stands for. Minus infinity, which means that there is none, stays. It
// is computed in several places, and the largest one is looked for by its value: so which product
// and sum are one operation is not left to the compiler.
__device__ __forceinline__ float logit_of(float x, const Options& o, float origin) {
  if (o.transformed && x != -kInf) {
    x = __fmul_rn(x, o.gain);
    // tanh(a) = 1 - 2 / (1 + e^(2 a)), to 2^-22 of the cap: what fp32 holds of a logit near it.
    if (o.cap > 0) x = fmaf(-2 * o.cap, __fdividef(1, 1 + fast_exp2(x)), o.cap);
  }
  return x - origin;
}
template <class T>
__device__ __forceinline__ float logit(const Chunk<T>& chunk, int j, const Options& o,
                                       float origin) {
  return logit_of(element(chunk, j), o, origin);
}

// Calls use(j, logit) for the elements of a lane; what is the same for all is decided once.
template <class T, class Use>
__device__ __forceinline__ void for_logits(const Chunk<T>& chunk, const Options& o, float origin,
                                           Use use) {
  if (o.transformed) {
#pragma unroll
    for (int j = 0; j < Chunk<T>::count; ++j) use(j, logit(chunk, j, o, origin));
  } else {
#pragma unroll
    for (int j = 0; j < Chunk<T>::count; ++j) use(j, element(chunk, j) - origin);
  }
}

struct LargestNan {
  __device__ __forceinline__ float operator()(float a, float b) const { return max_nan(a, b); }
};

// The maximum over all lanes; NaN if there is one. Of 16-bit numbers as they are, two at a time.
template <class T>
__device__ __forceinline__ float chunk_max_of_pairs(const Chunk<T>& chunk) {
  unsigned both = chunk.word[0];
#pragma unroll
  for (int w = 1; w < kPacks * 4; ++w) both = max2_nan<T>(both, chunk.word[w]);
  const T lower{static_cast<std::uint16_t>(both)}, upper{static_cast<std::uint16_t>(both >> 16)};
  return warp_reduce(max_nan(to_float(lower), to_float(upper)), LargestNan{});
}
template <class T>
__device__ __forceinline__ float chunk_max(const Chunk<T>& chunk, const Options& o, float origin) {
  if constexpr (sizeof(T) == 2) {
    if (!o.transformed && origin == 0) return chunk_max_of_pairs(chunk);
  }
  float max_logit = -kInf;
  for_logits(chunk, o, origin, [&](int, float y) { max_logit = max_nan(max_logit, y); });
  return warp_reduce(max_logit, LargestNan{});
}

}  // namespace quietstar::cuda::sampling
