// The kernel of softmax_cross_entropy for 16-bit logits without a soft-cap, the usual ones, in as
// few instructions an element as will do.
//
// Tiling: a row per block. A warp goes over chunks of 128 packs, four packs a lane; as soon as one
//   is added up, its registers take one of the next chunk. The chunks stay in shared memory as far
//   as that reaches, in places that only this thread uses, the others are read again, from L2.
// Sums: a thread takes its powers of two relative to the largest element of its first chunk, in one
//   fma and one instruction of the special-function unit, and does not look for a larger one later.
//   Where that may lose digits (elements 60 octaves above it, huge or infinite ones) the row is
//   added up again, one element at a time (add_slowly).
// Gradient: what the powers are multiplied with goes into their exponents. Where the exponents are
//   too large for that, again one element at a time.
// Left out of the sum: the target, and banned tokens, become minus infinity as a chunk is read; so
//   nothing is asked of single elements. The target's gradient is written at the end.
// Operations: the special-function unit takes 8 cycles for a warp's powers, one an element and
// pass;
//   so 8 instructions an element and pass are what there is time for. docs/gpu_paths.md has the
//   counts, scripts/compile_check.py the limits.
#pragma once

#include "linear_cross_entropy_row.cuh"

namespace quietstar::cuda {

constexpr unsigned kChunkPacks = 128;
constexpr int kChunkBytes = kChunkPacks * 16;
constexpr float kMaxSum = 0x1p60f, kMaxReference = 0x1p20f;  // of sums that lose no digits
constexpr float kMaxExponent = 256;  // whose rounding is far below that of the results
constexpr unsigned kBothSigns = 0x80008000u;

// What a lane holds of a chunk: 16-bit numbers, two to a word.
struct Words {
  unsigned at[16];

  __device__ __forceinline__ void set_pack(int u, const Pack<unsigned>& pack) {
#pragma unroll
    for (int w = 0; w < 4; ++w) at[u * 4 + w] = pack.at[w];
  }
  __device__ __forceinline__ void flip_signs() {
#pragma unroll
    for (int w = 0; w < 16; ++w) at[w] ^= kBothSigns;
  }
};

template <class T>
struct PlainRow {
  static constexpr int kSize = Pack<T>::size;
  static constexpr unsigned kMissing = std::is_same_v<T, BFloat16> ? 0xff80u : 0xfc00u;  // -inf

  RowOfLogits<T, PlainLogit> row;
  PlacedRow<T> at;
  int warp, lane, warps;
  int whole, chunks;  // chunks without an end of the row, and all of them
  int target_chunk;   // this lane's, else -1
  bool negative;      // the logits' signs are to be changed

  __device__ __forceinline__ PlainRow(const RowOfLogits<T, PlainLogit>& r,
                                      const PlacedRow<T>& place)
      : row(r), at(place), negative(r.logit.sign < 0) {
    warp = static_cast<int>(threadIdx.x / 32);
    lane = static_cast<int>(threadIdx.x % 32);
    warps = static_cast<int>(blockDim.x / 32);
    whole = static_cast<int>(static_cast<unsigned>(at.packs) / kChunkPacks);
    chunks = static_cast<int>((static_cast<unsigned>(at.packs) + kChunkPacks - 1) / kChunkPacks);
    const unsigned in_body = static_cast<unsigned>(row.target - at.head), pack = in_body / kSize;
    const bool mine = pack < static_cast<unsigned>(at.packs) && pack % 32 == threadIdx.x % 32;
    target_chunk = mine ? static_cast<int>(pack / kChunkPacks) : -1;
  }
  __device__ __forceinline__ unsigned target_bit() const {
    const unsigned in_body = static_cast<unsigned>(row.target - at.head);
    return 1u << (in_body / kSize % kChunkPacks / 32 * kSize + in_body % kSize);
  }

  // Whether this thread's packs have the target.
  __device__ __forceinline__ bool writes_target() const {
    return target_chunk >= 0 && target_chunk % warps == warp;
  }

  // The first one of this lane's four packs, which lie 32 packs apart.
  __device__ __forceinline__ int first_pack(int chunk) const {
    return chunk * static_cast<int>(kChunkPacks) + lane;
  }
  __device__ __forceinline__ unsigned* words_of(int chunk) const {
    return reinterpret_cast<unsigned*>(at.body) + std::int64_t{4} * first_pack(chunk);
  }

  // Minus infinity for packs that are not there, as it is before the signs are changed.
  __device__ __forceinline__ void load(Words& words, int chunk) const {
    const unsigned* const from = words_of(chunk);
    const unsigned missing = (kMissing << 16 | kMissing) ^ (negative ? kBothSigns : 0);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      Pack<unsigned> pack{{missing, missing, missing, missing}};
      if (first_pack(chunk) + u * 32 < at.packs) pack = load16_past_l1(from + u * 128);
      words.set_pack(u, pack);
    }
  }

  // Whether a chunk may have to be changed before it is added up.
  __device__ __forceinline__ bool needs_changes() const {
    return negative || row.banned != nullptr;
  }

  // Changes signs, and takes out banned tokens and, with `target`, the target.
  template <bool target>
  __device__ __forceinline__ void change(Words& words, int chunk) const {
    if (negative) words.flip_signs();
    unsigned out = target && chunk == target_chunk ? target_bit() : 0;
    if (row.banned != nullptr) {
      // A byte has the bits of a pack, or, after `head`, a part of them.
      const auto* const bytes =
          reinterpret_cast<const std::uint8_t*>(row.banned) + first_pack(chunk);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (first_pack(chunk) + u * 32 < at.packs) {
          const unsigned both = bytes[u * 32] | unsigned{bytes[u * 32 + 1]} << 8;
          out |= (both >> at.head & 0xffu) << (u * kSize);
        }
      }
    }
    if (out == 0) return;
#pragma unroll
    for (int w = 0; w < 16; ++w) {
      unsigned& word = words.at[w];
      if (out >> (2 * w) & 1) word = (word & 0xffff0000u) | kMissing;
      if (out >> (2 * w + 1) & 1) word = (word & 0xffffu) | kMissing << 16;
    }
  }
};

// This thread's part of a row's sum, of what lies in packs; the first `kept` chunks stay at
// `kept_words`. Its sum is NaN where it may have lost digits.
template <class T, bool keeps>
__device__ __forceinline__ Partial add_chunks(const PlainRow<T>& row, unsigned* kept_words,
                                              int kept) {
  const float unit = row.row.logit.unit;
  int number = row.warp;
  if (number >= row.chunks) return {kLowest, 0};
  Words words;
  float reference = 0, shift = 0, even = 0, odd = 0;
  bool look = true;  // in the first round, and where all need changes
  const unsigned* next = row.words_of(number + row.warps);
  unsigned* kept_at = kept_words + row.first_pack(number) * 4;
  const auto add = [&](auto with_next) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const unsigned pair = words.at[u * 4 + w];
        even += fast_exp2(fmaf(number_in<T>(pair, 0), unit, shift));
        odd += fast_exp2(fmaf(number_in<T>(pair, 1), unit, shift));
      }
      if (with_next.value) words.set_pack(u, load16_past_l1(next + u * 128));
    }
  };
  row.load(words, number);
  for (;;) {
    if (look || number == row.target_chunk) {
      row.template change<true>(words, number);
      if (number == row.warp) {
        unsigned pair = words.at[0];
#pragma unroll
        for (int w = 1; w < 16; ++w) pair = max2_nan<T>(pair, words.at[w]);
        reference = fmaxf(number_in<T>(pair, 0), number_in<T>(pair, 1));
        shift = fminf(-reference * unit, -kLowest);
        look = row.needs_changes();
      }
    }
    if (keeps && number < kept) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const unsigned* const w = &words.at[u * 4];
        store16(kept_at + u * 128, Pack<unsigned>{{w[0], w[1], w[2], w[3]}});
      }
    }
    if (keeps) kept_at += row.warps * kChunkPacks * 4;
    number += row.warps;
    keep(number);
    if (number < row.whole) {
      add(std::true_type{});
      next += row.warps * kChunkPacks * 4;
      keep(next);
    } else {
      add(std::false_type{});
      if (number >= row.chunks) break;
      row.load(words, number);
    }
  }
  const float sum = even + odd;
  if (reference < kLowest && sum == 0) return {kLowest, 0};
  // From 2^(x unit + shift) to 2^((x - reference) unit).
  const float exact = sum * fast_exp2(-fmaf(reference, unit, shift));
  return {reference,
          sum < kMaxSum && fabsf(shift) < kMaxReference ? exact : __uint_as_float(0x7fc00000u)};
}

// This thread's part of a row's sum.
template <class T, bool keeps>
__device__ __forceinline__ Partial add_row(const RowOfLogits<T, PlainLogit>& row, T* data,
                                           int vocab, unsigned* kept_words, int kept) {
  Partial mine =
      add_chunks<T, keeps>(PlainRow<T>(row, PlacedRow<T>(data, vocab)), kept_words, kept);
  keep(data);
  const PlacedRow<T> at(data, vocab);
  if (at.has_single()) row.add_single(mine, at.single, to_float(data[at.single]));
  return mine;
}

// The same of all tokens of a row, and exact whatever they are.
template <class T>
__device__ __forceinline__ Partial add_slowly(RowOfLogits<T, PlainLogit> row, const T* data,
                                              int vocab) {
  Partial mine{kLowest, 0};
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += static_cast<int>(blockDim.x)) {
    row.add_single(mine, i, to_float(data[i]));
  }
  return mine;
}

// The gradient of a row, likewise.
template <class T>
__device__ __forceinline__ void rewrite_slowly(RowOfLogits<T, PlainLogit> row, T* data, int vocab,
                                               float max_level, float factor, float at_target) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += static_cast<int>(blockDim.x)) {
    data[i] = from_float<T>(row.gradient(to_float(data[i]), i, max_level, factor, at_target));
  }
}

// Writes sign 2^(x unit + shift) over the packs of a row, whose first `kept` chunks lie at
// kept_words.
template <class T>
__device__ __forceinline__ void rewrite_chunks(const PlainRow<T>& row, const unsigned* kept_words,
                                               int kept, float shift, bool minus) {
  const float unit = row.row.logit.unit;
  int number = row.warp;
  Words words;
  unsigned* to = row.words_of(number);
  const auto rewrite = [&] {
#pragma unroll
    for (int w = 0; w < 16; ++w) {
      unsigned& pair = words.at[w];
      pair = pack2<T>(fast_exp2(fmaf(number_in<T>(pair, 0), unit, shift)),
                      fast_exp2(fmaf(number_in<T>(pair, 1), unit, shift)));
    }
    if (minus) words.flip_signs();
    const auto store = [&](int u) {
      const unsigned* const w = &words.at[u * 4];
      store16_global(to + u * 128, Pack<unsigned>{{w[0], w[1], w[2], w[3]}});
    };
    if (number < row.whole) {
#pragma unroll
      for (int u = 0; u < 4; ++u) store(u);
    } else {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (row.first_pack(number) + u * 32 < row.at.packs) store(u);
      }
    }
    to += row.warps * kChunkPacks * 4;
    keep(to);
    number += row.warps;
    keep(number);
  };
  kept = min(kept, row.chunks);
  const unsigned* kept_at = kept_words + row.first_pack(number) * 4;
  while (number < kept) {
#pragma unroll
    for (int u = 0; u < 4; ++u) words.set_pack(u, load16(kept_at + u * 128));
    kept_at += row.warps * kChunkPacks * 4;
    rewrite();
  }
  while (number < row.chunks) {
    row.load(words, number);
    if (row.needs_changes()) row.template change<false>(words, number);
    rewrite();
  }
}

// softmax_cross_entropy_rows (linear_cross_entropy.cuh) for these logits. `kept` is a number of
// chunks.
template <class T, bool gradient>
__global__ void __launch_bounds__(kMaxRowThreads)
    softmax_cross_entropy_rows_plain(T* logits, int rows, int vocab, std::int64_t row_stride,
                                     const std::int64_t* targets, const unsigned char* valid_rows,
                                     const std::uint32_t* banned, PlainLogit logit, float scale,
                                     float* nll, const float* row_weights, int kept) {
  QUIETSTAR_DYNAMIC_SHARED(memory);
  QUIETSTAR_SHARED(Partial, scratch, [3][32]);
  auto* const kept_words = reinterpret_cast<unsigned*>(memory);

  int turn = 0;  // the scratch of the row before may still be read
  for (int r = static_cast<int>(blockIdx.x); r < rows; r += static_cast<int>(gridDim.x)) {
    T* data = logits + r * row_stride;
    if (valid_rows != nullptr && valid_rows[r] == 0) {
      if (threadIdx.x == 0) nll[r] = 0;
      if (gradient) PlacedRow<T>(data, vocab).clear();
      continue;
    }
    const RowOfLogits<T, PlainLogit> row(targets[r], vocab, banned, logit);
    const float x = row.target_logit(data);  // read by all before anybody writes
    Partial mine = add_row<T, gradient>(row, data, vocab, kept_words, kept);
    Partial others = block_joined(mine, logit.unit, scratch[turn]);
    turn ^= 1;
    if (!(others.sum <= -kLowest)) {
      others = block_joined(add_slowly(row, data, vocab), logit.unit, scratch[2]);
    }
    const Softmax sums = with_target(row, others, x, nll + r);
    if (!gradient) continue;

    // What follows from the row is computed again: it would not fit the registers till here.
    keep(r);
    data = logits + r * row_stride;
    const float weight = row_weights[r];
    if (weight == 0) {
      PlacedRow<T>(data, vocab).clear();
      continue;
    }
    const float scaled = weight * scale, factor = scaled / sums.total;
    const float at_target = sums.at_target(row, x, scaled);
    const float lift = -log2f(fabsf(factor)), shift = -fmaf(sums.max_level, logit.unit, lift);
    if (fabsf(lift) < kMaxExponent && fabsf(shift) < kMaxExponent) {
      const PlacedRow<T> at(data, vocab);
      if (at.has_single()) {
        T& single = data[at.single];
        single = from_float<T>(
            row.gradient(to_float(single), at.single, sums.max_level, factor, at_target));
      }
      rewrite_chunks(PlainRow<T>(row, at), kept_words, kept, shift, scaled < 0);
      keep(data);
      const PlainRow<T> again(row, PlacedRow<T>(data, vocab));
      if (again.writes_target()) data[row.target] = from_float<T>(at_target);
    } else {
      rewrite_slowly(row, data, vocab, sums.max_level, factor, at_target);
    }
  }
}

}  // namespace quietstar::cuda
