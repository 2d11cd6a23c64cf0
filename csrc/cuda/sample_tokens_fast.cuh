// The usual call on 16-bit logits: any temperature of use, nothing cut off, no transformation. Its
// powers of two come from the special-function unit, and its end is short; a row whose number falls
// too close to an edge between two tokens is added up again, exactly.
//
// Everything here but the first pass is the work of one warp, in as few instructions as will do:
// while it runs, the others of its row have nothing to load, and in a call of few rows the
// instructions themselves come from memory for the first time.
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

// Whether one of the few banned ids lies in a chunk.
template <class T>
__device__ __forceinline__ bool has_banned(const Row<T>& row, int number) {
  bool here = false;
#pragma unroll
  for (int i = 0; i < kFewBanned / 32; ++i) {
    const int id = row.banned[i * 32 + lane_id()];
    here = here || (id >= 0 && (static_cast<unsigned>(id) + row.lead) / kChunk<T> == number);
  }
  return __any_sync(kAllLanes, here);
}

// 2^(x factor + shift), of the special-function unit. above_0 is positive, so that minus infinity
// stays what it is.
__device__ __forceinline__ float fast_power(float x, float shift, const Options& o) {
  return fast_exp2(fmaf(x, o.above_0, fmaf(x, o.below_hi, shift)));
}

// Maximum and sum of a chunk that a warp holds; the sum exact, or of the special-function unit.
template <class T, bool kExact, class Result>
__device__ __forceinline__ void add_up(const Chunk<T>& chunk, const Options& o, float origin,
                                       float& max_logit, Result& total) {
  unsigned pair = chunk.word[0];
#pragma unroll
  for (int w = 1; w < kPacks * 4; ++w) pair = max2_nan<T>(pair, chunk.word[w]);
  const T lower{static_cast<std::uint16_t>(pair)}, upper{static_cast<std::uint16_t>(pair >> 16)};
  max_logit = warp_max(max_nan(to_float(lower), to_float(upper)));
  if (kExact) max_logit -= origin;
  const float shift = -scale_of(max_logit, o);
  const ExactPower power(max_logit, o);
  Result part[4] = {};
#pragma unroll
  for (int j = 0; j < Chunk<T>::count; ++j) {
    const float x = element(chunk, j);
    Result mine;
    if constexpr (kExact) {
      mine = static_cast<double>(power(x - origin));
    } else {
      mine = fast_power(x, shift, o);
    }
    part[j % 4] = j < 4 ? mine : part[j % 4] + mine;
  }
  total = warp_reduce((part[0] + part[1]) + (part[2] + part[3]), Sum{});
  if (kExact && !has_weight(max_logit, o)) total = 0;
}

// Takes the banned ids out of a chunk; with few of them, asks first whether it has any.
template <class T>
__device__ __forceinline__ void ban_few(Chunk<T>& chunk, const Options& o, const Row<T>& row,
                                        int number) {
  if (o.banned_bits || (o.banned_count > 0 && has_banned(row, number))) ban(chunk, o, row, number);
}

// Maxima and sums of the chunks [first, last), chunk i to maxima[i] and sums[i], by `warps` warps
// of which this is number `warp`. The next chunk is under way while one is worked on, and
// `meanwhile` is done while the first one is. A warp goes from the end of the row to its beginning,
// so that the chunk that the row's end cuts is its first one, which has to be waited for anyway.
template <class T, class Meanwhile>
__device__ __forceinline__ void scan_chunks(const Row<T>& row, const Options& o, int first,
                                            int last, int warp, int warps, float* sums,
                                            float* maxima, Meanwhile meanwhile) {
  Chunk<T> chunk, next;
  const int first_whole = max(first, row.lead > 0 ? 1 : 0);
  const int end_whole = static_cast<int>(row.end / kChunk<T>);
  int after = last - 1 - warp;
  const unsigned* words = words_of(row, after);
  // One place to load at and one to add up at, or their code would stand here several times.
  for (int number = last;;) {
    if (after >= first_whole && after < end_whole) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) set_pack(next, i, load16(words + i * 128));
    } else if (after >= first) {
      load_cut_chunk(next, row, after);
    }
    words -= warps * (kPacks * 128);
    if (number == last) {
      meanwhile();
    } else {
      ban_few(chunk, o, row, number);
      float max_logit, total;
      add_up<T, false>(chunk, o, row.origin, max_logit, total);
      if (lane_id() == 0) {
        sums[number] = total;
        maxima[number] = max_logit;
      }
    }
    if (after < first) return;
    chunk = next;
    number = after;
    after -= warps;
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
template <class Number>
__device__ __forceinline__ int choose(Number mine, Number running, Number left, bool& passes) {
  const unsigned hits = __ballot_sync(kAllLanes, mine > 0 && left < running);
  const unsigned some = __ballot_sync(kAllLanes, mine > 0);
  passes = hits != 0;
  return hits ? lowest_lane(hits) : some ? highest_lane(some) : -1;
}

constexpr int kMaxBlockRows = 4;

// What a fast block keeps in shared memory.
struct FastState {
  struct OfRow {
    float sums[kMaxEntries], maxima[kMaxEntries];
    double uniform;
    float row_max;
    Verdict verdict;
  };
  double exact[kMaxEntries];  // of one row after the other
  OfRow rows[kMaxBlockRows];
  int banned[kFewBanned];
};

// log2 of a positive normal number, to 2^-22: that of its fraction is below 1.
__device__ __forceinline__ double short_log2(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52) - 1023;
  bits = (bits & ((std::uint64_t{1} << 52) - 1)) | std::uint64_t{1023} << 52;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<double>(exponent) + static_cast<double>(__log2f(static_cast<float>(x)));
}

// One warp draws from the sums of a fast pass. Taking their errors for independent from chunk to
// chunk, an edge is off by kDoubt * sqrt(sum of squares), that of the chunk chosen once more for
// the sums inside of it; a number that falls closer to one than that is left undecided. So the
// token is that of the exact sums.
template <class T>
__device__ __forceinline__ Verdict find_fast(const Row<T>& row, const Options& o, std::int64_t n,
                                             double uniform, const float* sums, const float* maxima,
                                             float& row_max) {
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
  double sum_of_mine = 0;
  float squares = 0;
#pragma unroll 1
  for (int i = from; i < to; ++i) {
    const float sum = weighed(i);
    sum_of_mine += static_cast<double>(sum);
    squares = fmaf(sum, sum, squares);
  }
  const double running_chunks = running_sum(sum_of_mine);
  const double total = __shfl_sync(kAllLanes, running_chunks, 31);
  double rest = uniform * total;
  bool passes;
  int chosen = choose(sum_of_mine, running_chunks, rest, passes);
  rest -= __shfl_sync(kAllLanes, before(running_chunks), chosen);
  int number = chosen * each;
  const int stop = min(number + each, row.chunks) - 1;
#pragma unroll 1
  for (; number < stop; ++number) {
    const double sum = static_cast<double>(weighed(number));
    if (rest < sum) break;
    rest -= sum;
  }

  // In units of the chunk from here on.
  const float max_logit = maxima[number], chunk_scale = scale_of(max_logit, o);
  const float up = float_power_of_two(scale - chunk_scale);
  float left = static_cast<float>(fmax(rest, 0.0) * static_cast<double>(up));
  const std::int64_t first = static_cast<std::int64_t>(number) * kChunk<T>;
  const T* const chunk_at = row.data - row.lead + first;
  const unsigned mask = allowed(row, o, first + lane * 32);
  float mine = 0;
  if (mask == kAllLanes) {
    Chunk<T> chunk;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const auto* words = reinterpret_cast<const unsigned*>(chunk_at) + lane * 16;
      set_pack(chunk, i, load16(words + i * 4));
    }
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < 32; ++j) part[j % 4] += fast_power(element(chunk, j), -chunk_scale, o);
    mine = (part[0] + part[1]) + (part[2] + part[3]);
  } else {
#pragma unroll 1
    for (int j = 0; j < 32; ++j) {
      if (mask >> j & 1) mine += fast_power(to_float(chunk_at[lane * 32 + j]), -chunk_scale, o);
    }
  }
  __syncwarp();
  float running = running_sum(mine);
  chosen = choose(mine, running, left, passes);
  if (!passes) return kUndecided;  // rounding let the search run off the end
  left -= __shfl_sync(kAllLanes, before(running), chosen);
  // The elements of the lane chosen, one to each lane.
  const bool may = __shfl_sync(kAllLanes, mask, chosen) >> lane & 1;
  const int place = chosen * 32 + lane;
  const float x = may ? to_float(chunk_at[place]) : -kInf;
  mine = fast_power(x, -chunk_scale, o);
  running = running_sum(mine);
  chosen = choose(mine, running, left, passes);
  if (!passes) return kUndecided;
  const float margin = fminf(left - (running - mine), running - left);
  const float in_chunk = weighed(number);
  squares = fmaf(in_chunk, in_chunk, warp_reduce(squares, Sum{}));
  if (!(__shfl_sync(kAllLanes, margin, chosen) > kDoubt * sqrtf(squares) * up)) return kUndecided;
  if (lane == chosen) {
    const double log2p = x * o.factor - scale - short_log2(total);
    write_row(o, n, first + place - row.lead, static_cast<float>(log2p < 0 ? log2p * kLn2 : 0));
  }
  return kDecided;
}

template <class T>
__device__ __forceinline__ void draw_fast(const Row<T>& row, const Options& o, std::int64_t n,
                                          FastState::OfRow& state) {
  float row_max;
  const Verdict verdict = find_fast(row, o, n, state.uniform, state.sums, state.maxima, row_max);
  if (lane_id() == 0) {
    state.row_max = row_max;
    state.verdict = verdict;
  }
}

// Every thread of the block calls it, whichever row it has worked on before: adds the row up
// exactly, and draws again.
template <class T>
QUIETSTAR_NOINLINE __device__ void draw_exactly(FastState& block, int in_block, const Options& o,
                                                std::int64_t n) {
  FastState::OfRow& state = block.rows[in_block];
  double* const exact = block.exact;
  Row<T> row = row_of<T>(o, n, block.banned);
  float row_max = state.row_max;
  if (state.verdict == kTooLarge) {
    row.origin = row_max;
    row_max = 0;
  }
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  // The warps of a whole block do not wait for memory; registers for two chunks would be spilled.
  for (int number = warp; number < row.chunks; number += warps) {
    Chunk<T> chunk;
    load_chunk(chunk, row, number, false);
    ban_few(chunk, o, row, number);
    float max_logit;
    double total;
    add_up<T, true>(chunk, o, row.origin, max_logit, total);
    if (lane_id() == 0) {
      exact[number] = total;
      state.maxima[number] = max_logit;
    }
  }
  __syncthreads();
  weigh(o, row.chunks, state.maxima, row_max, exact);
  if (threadIdx.x < 32) draw(row, o, n, exact, state.maxima, row_max, kLowest);
  __syncthreads();
}

}  // namespace quietstar::cuda::sampling
