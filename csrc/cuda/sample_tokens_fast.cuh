// The usual call on 16-bit logits: any temperature of use, nothing cut off, no transformation. Its
// powers of two come from the special-function unit, and its end is short; a row whose number falls
// too close to an edge between two tokens is added up again, exactly.
//
// Everything here but the first pass is the work of one warp, in as few instructions as will do:
// while it runs, the loads of its block stand still, and in a call of few rows the instructions
// themselves come from memory for the first time.
#pragma once

#include "quietstar/philox.h"
#include "sample_tokens_draw.cuh"

namespace quietstar::cuda::sampling {

// Sums of the fast pass are each off by so much of themselves: a few times what is usual where the
// errors of a chunk's elements add up.
constexpr float kDoubt = 5e-7f;

// Maximum over the lanes, NaN if there is one: as integers in the same order, where the NaN that
// max_nan makes is the largest.
__device__ __forceinline__ int ordered(int bits) {
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float warp_max(float x) {
  return __int_as_float(ordered(__reduce_max_sync(kAllLanes, ordered(__float_as_int(x)))));
}

// 2^n for an integer n, 0 where that is no normal number.
__device__ __forceinline__ float float_power_of_two(float n) {
  return n > -127 ? __int_as_float((static_cast<int>(fminf(n, 127)) + 127) << 23) : 0;
}

// Which of a lane's banned ids, one of 32, lie in a chunk, is asked of their chunks' numbers.
struct BannedChunks {
  int at[kFewBanned / 32];

  template <class T>
  __device__ __forceinline__ BannedChunks(const Row<T>& row, const Options& o) {
#pragma unroll
    for (int i = 0; i < kFewBanned / 32; ++i) {
      const int id = o.banned_count > 0 ? row.banned[i * 32 + lane_id()] : -1;
      at[i] = id < 0 ? -1 : static_cast<int>((static_cast<unsigned>(id) + row.lead) / kChunk<T>);
    }
  }
  __device__ __forceinline__ bool has(int number) const {
    bool here = false;
#pragma unroll
    for (int i = 0; i < kFewBanned / 32; ++i) here = here || at[i] == number;
    return __any_sync(kAllLanes, here);
  }
};

// Maximum and sum of a chunk that a warp holds; the sum exact, or of the special-function unit.
// With `kNext`, as soon as a pack is added up its registers take what lies at `next`.
template <class T, bool kExact, bool kNext, class Result>
__device__ __forceinline__ void add_up(Chunk<T>& chunk, const Options& o, float origin,
                                       const unsigned* next, float& max_logit, Result& total) {
  constexpr int kSize = Pack<T>::size;
  unsigned pair = chunk.word[0];
#pragma unroll
  for (int w = 1; w < kPacks * 4; ++w) pair = max2_nan<T>(pair, chunk.word[w]);
  const T lower{static_cast<std::uint16_t>(pair)}, upper{static_cast<std::uint16_t>(pair >> 16)};
  max_logit = warp_max(max_nan(to_float(lower), to_float(upper)));
  if (kExact) max_logit -= origin;
  const float shift = -scale_of(max_logit, o);
  const ExactPower power(max_logit, o);
  Result part[4];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const float x = element(chunk, i * kSize + k);
      Result mine;
      if constexpr (kExact) {
        mine = static_cast<double>(power(x - origin));
      } else {
        // above_0 is positive, so that minus infinity stays what it is.
        mine = fast_exp2(fmaf(x, o.above_0, fmaf(x, o.below_hi, shift)));
      }
      part[k % 4] = i == 0 && k < 4 ? mine : part[k % 4] + mine;
    }
    if (kNext) set_pack(chunk, i, kExact ? load16(next + i * 128) : load16_past_l1(next + i * 128));
  }
  total = warp_reduce((part[0] + part[1]) + (part[2] + part[3]), Sum{});
  if (kExact && !has_weight(max_logit, o)) total = 0;
}

// Maxima and sums of the chunks [first, last), chunk i to maxima[i] and sums[i]. A warp goes from
// the end of the row to its beginning, so that the chunk that the row's end cuts is its first one,
// which has to be waited for anyway.
template <class T, bool kExact, class Result>
__device__ __forceinline__ void scan_chunks(const Row<T>& row, const Options& o, int first,
                                            int last, Result* sums, float* maxima) {
  constexpr int kChunkWords = kPacks * 128;
  const int lane = lane_id(), warps = static_cast<int>(blockDim.x / 32);
  const BannedChunks banned(row, o);
  int number = last - 1 - static_cast<int>(threadIdx.x / 32);
  // Down to here the next chunk is a whole one.
  const int last_whole = max(first, row.lead > 0 ? 1 : 0) + warps;
  Chunk<T> chunk;
  const auto work = [&](auto next, const unsigned* words) {
    if (o.banned_bits || banned.has(number)) ban(chunk, o, row, number);
    float max_logit;
    Result total;
    add_up<T, kExact, next.value>(chunk, o, row.origin, words, max_logit, total);
    if (lane == 0) {
      sums[number] = total;
      maxima[number] = max_logit;
    }
    number -= warps;
  };
  while (number >= first) {
    load_chunk(chunk, row, number, !kExact);
    // This lane's part of the next chunk.
    const auto* words = reinterpret_cast<const unsigned*>(row.data - row.lead) +
                        static_cast<std::int64_t>(number - warps) * kChunkWords + lane * 4;
    while (number >= last_whole) {
      work(std::true_type{}, words);
      words -= warps * kChunkWords;
      keep(words);
    }
    work(std::false_type{}, nullptr);
  }
}

// Which of 32 neighbouring places, from `first` on, hold an id that is not banned.
template <class T>
__device__ __forceinline__ unsigned allowed(const Row<T>& row, const Options& o,
                                            std::int64_t first) {
  unsigned found = kAllLanes;
  if (first < row.lead) found <<= row.lead - first;
  const std::int64_t left = row.end - first;
  if (left < 32) found = left > 0 ? found & ((1u << left) - 1) : 0;
  const std::int64_t id = first - row.lead;
  if (o.banned_bits) {
    const std::int64_t words = (o.vocab + 31) / 32;
    const auto word = [&](std::int64_t i) {
      return i >= 0 && i < words ? static_cast<std::uint64_t>(o.banned_bits[i]) : 0;
    };
    const std::int64_t at = (id + 32) / 32 - 1;  // id >= -7
    found &= ~static_cast<unsigned>((word(at) | word(at + 1) << 32) >> (id - at * 32));
  }
  for (int i = 0; i < o.banned_count; ++i) {
    const std::int64_t place = row.banned[i] - id;
    if (row.banned[i] >= 0 && place >= 0 && place < 32) found &= ~(1u << place);
  }
  return found;
}

enum Verdict { kDecided, kUndecided, kTooLarge };

// The first lane whose running sum passes `left`, else the last one that has weight; -1: none has.
__device__ __forceinline__ int choose(double mine, double running, double left, bool& passes) {
  const unsigned hits = __ballot_sync(kAllLanes, mine > 0 && left < running);
  const unsigned some = __ballot_sync(kAllLanes, mine > 0);
  passes = hits != 0;
  return hits ? lowest_lane(hits) : some ? highest_lane(some) : -1;
}

// One warp draws from the sums of a fast pass. Taking their errors for independent from chunk to
// chunk, an edge is off by kDoubt * sqrt(sum of squares); a number that falls closer to one than
// that is left undecided. So the token is that of the exact sums.
template <class T>
QUIETSTAR_NOINLINE __device__ Verdict draw_fast(Row<T> row, const Options& o, std::int64_t n,
                                                double uniform, const float* sums,
                                                const float* maxima, float& row_max) {
  const int lane = lane_id();
  // A lane has neighbouring chunks, and later neighbouring elements: one running sum each.
  const int each = (row.chunks + 31) / 32;
  const int from = lane * each, to = min(from + each, row.chunks);
  row_max = -kInf;
#pragma unroll 1
  for (int i = from; i < to; ++i) row_max = max_nan(row_max, maxima[i]);
  row_max = warp_max(row_max);
  if (!(fabsf(row_max) < kInf)) {  // NaN, +inf, or nothing is left
    if (lane == 0) write_row(o, n, -1, kNaN);
    return kDecided;
  }
  if (fabsf(row_max) * o.hi > kShiftedFrom) return kTooLarge;
  const float scale = scale_of(row_max, o);
  const auto weighed = [&](int i) {
    return sums[i] * float_power_of_two(scale_of(maxima[i], o) - scale);
  };
  double mine = 0;
  float squares = 0;
#pragma unroll 1
  for (int i = from; i < to; ++i) {
    const float sum = weighed(i);
    mine += static_cast<double>(sum);
    squares = fmaf(sum, sum, squares);
  }
  double running = running_sum(mine);
  const double total = __shfl_sync(kAllLanes, running, 31);
  double left = uniform * total;
  bool passes;
  int chosen = choose(mine, running, left, passes);
  left -= __shfl_sync(kAllLanes, before(running), chosen);
  int number = chosen * each;
  const int stop = min(number + each, row.chunks) - 1;
#pragma unroll 1
  for (; number < stop; ++number) {
    const double sum = static_cast<double>(weighed(number));
    if (left < sum) break;
    left -= sum;
  }

  // In units of the chunk from here on, whose powers are exact.
  const float max_logit = maxima[number], up = scale - scale_of(max_logit, o);
  left = fmax(left, 0.0) * power_of_two(up);
  const ExactPower power(max_logit, o);
  const auto weight = [&](float x) { return static_cast<double>(power.above(x, kLowest)); };
  const std::int64_t first = static_cast<std::int64_t>(number) * kChunk<T>;
  const T* const chunk_at = row.data - row.lead + first;
  const unsigned mask = allowed(row, o, first + lane * 32);
  mine = 0;
  if (mask == kAllLanes) {
    Chunk<T> chunk;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const auto* words = reinterpret_cast<const unsigned*>(chunk_at) + lane * 16;
      set_pack(chunk, i, load16(words + i * 4));
    }
    double odd = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) (j % 2 ? odd : mine) += weight(element(chunk, j));
    mine += odd;
  } else {
#pragma unroll 1
    for (int j = 0; j < 32; ++j) {
      if (mask >> j & 1) mine += weight(to_float(chunk_at[lane * 32 + j]));
    }
  }
  __syncwarp();
  running = running_sum(mine);
  chosen = choose(mine, running, left, passes);
  if (!passes) return kUndecided;  // rounding let the search run off the end
  left -= __shfl_sync(kAllLanes, before(running), chosen);
  // The elements of the lane chosen, one to each lane.
  const bool may = __shfl_sync(kAllLanes, mask, chosen) >> lane & 1;
  const int place = chosen * 32 + lane;
  const float x = may ? to_float(chunk_at[place]) : -kInf;
  mine = weight(x);
  running = running_sum(mine);
  chosen = choose(mine, running, left, passes);
  if (!passes) return kUndecided;
  const double margin = fmin(left - (running - mine), running - left);
  const float doubt = kDoubt * sqrtf(warp_reduce(squares, Sum{}));
  if (!(__shfl_sync(kAllLanes, margin, chosen) > doubt * power_of_two(up))) return kUndecided;
  if (lane == chosen) {
    const double log2p = x * o.factor - scale - log2(total);
    write_row(o, n, first + place - row.lead, static_cast<float>(log2p < 0 ? log2p * kLn2 : 0));
  }
  return kDecided;
}

// What the block of a row keeps in shared memory.
struct FastState {
  double exact[kMaxEntries];
  float sums[kMaxEntries], maxima[kMaxEntries];
  int banned[kFewBanned];
  double uniform;
  float row_max;
  Verdict verdict;
};

// Every thread of the block calls it: adds the row up exactly, and draws again.
template <class T>
QUIETSTAR_NOINLINE __device__ void draw_exactly(FastState& state, Row<T> row, const Options& o,
                                                std::int64_t n) {
  float row_max = state.row_max;
  if (state.verdict == kTooLarge) {
    row.origin = row_max;
    row_max = 0;
  }
  scan_chunks<T, true>(row, o, 0, row.chunks, state.exact, state.maxima);
  __syncthreads();
  weigh(o, row.chunks, state.maxima, row_max, state.exact);
  if (threadIdx.x < 32) draw(row, o, n, state.exact, state.maxima, row_max, kLowest);
}

}  // namespace quietstar::cuda::sampling
