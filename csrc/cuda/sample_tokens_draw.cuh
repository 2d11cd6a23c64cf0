// The end of a row: the uniform number picks an entry by the running sum of the entries, and that
// entry is read again to find the token inside, in the order of the ids.
#pragma once

#include "quietstar/philox.h"
#include "sample_tokens_sum.cuh"

namespace quietstar::cuda::sampling {

constexpr double kLn2 = 0.6931471805599453;

// Sums over the lanes up to and including this one.
template <class Number>
__device__ __forceinline__ Number running_sum(Number value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number other = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += other;
  }
  return value;
}
// What running_sum gave the lane before, 0 for the first.
template <class Number>
__device__ __forceinline__ Number before(Number running) {
  const Number other = __shfl_up_sync(kAllLanes, running, 1);
  return lane_id() == 0 ? 0 : other;
}
__device__ __forceinline__ int lowest_lane(unsigned votes) {
  return __ffs(static_cast<int>(votes)) - 1;
}
__device__ __forceinline__ int highest_lane(unsigned votes) {
  return 31 - __clz(static_cast<int>(votes));
}

__device__ __forceinline__ void write_row(const Options& o, std::int64_t n, std::int64_t token,
                                          float logprob) {
  o.tokens[n] = token;
  o.logprobs[n] = logprob;
}

// A token at its place in the row, and its element.
struct Found {
  long long place;
  float x;
};

// One warp looks for the first token of an entry whose running sum passes `left`.
template <class T>
__device__ __forceinline__ Found find(const Row<T>& row, const Options& o, int entry,
                                      float max_logit, float floor, double left) {
  constexpr int kSize = Pack<T>::size;
  const ExactPower power(max_logit, o);
  const int stop = min((entry + 1) * o.per_entry, row.chunks);
  Found last{-1, 0};
  double passed = 0;
  for (int number = entry * o.per_entry; number < stop; ++number) {
    Chunk<T> chunk;
    load_chunk(chunk, row, number, false);
    ban(chunk, o, row, number);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      double mine = 0;
      float e[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        e[k] = power.above(logit(chunk, i * kSize + k, o, row.origin), floor);
        mine += static_cast<double>(e[k]);
      }
      const double running = running_sum(mine), below = before(running);
      const unsigned hits = __ballot_sync(kAllLanes, mine > 0 && left < passed + running);
      // Every lane goes through its own elements; only the first one that hit is asked.
      double low = passed + below;
      bool found = false;
      Found here = last;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (found || !(e[k] > 0)) continue;
        here.place = static_cast<long long>(number) * kChunk<T> + place_in_chunk<T>(i * kSize + k);
        here.x = element(chunk, i * kSize + k);
        low += static_cast<double>(e[k]);
        found = left < low;
      }
      if (hits) {
        const int lane = lowest_lane(hits);
        here.place = __shfl_sync(kAllLanes, here.place, lane);
        here.x = __shfl_sync(kAllLanes, here.x, lane);
        return here;
      }
      last = here;
      passed += __shfl_sync(kAllLanes, running, 31);
    }
  }
  // Rounding let the search run off the end: the last token that has weight.
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const long long place = __shfl_xor_sync(kAllLanes, last.place, step);
    const float x = __shfl_xor_sync(kAllLanes, last.x, step);
    if (place > last.place) {
      last.place = place;
      last.x = x;
    }
  }
  return last;
}

// Brings the sums to the scale of the row's maximum. Every thread of the block calls it.
__device__ __forceinline__ void weigh(const Options& o, int entries, const float* maxima,
                                      float row_max, double* sums) {
  const float scale = scale_of(row_max, o);
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += threads) {
    sums[i] *= power_of_two(scale_of(maxima[i], o) - scale);
  }
  __syncthreads();
}

// One warp draws from weighed sums: sums[i] in units of 2^scale_of(row_max).
template <class T>
QUIETSTAR_NOINLINE __device__ void draw(Row<T> row, const Options& o, std::int64_t n,
                                        const double* sums, const float* maxima, float row_max,
                                        float floor) {
  double total = 0;
  for (int i = lane_id(); i < row.entries; i += 32) total += sums[i];
  total = warp_reduce(total, Sum{});
  double left = philox_uniform(static_cast<std::uint64_t>(*o.seed),
                               o.offset + static_cast<std::uint64_t>(n)) *
                total;
  // Where rounding lets the search run off an end, the last entry that has weight is taken.
  int entry = 0;
  double passed = 0, start = 0;
  for (int first = 0; first < row.entries; first += 32) {
    const int i = first + lane_id();
    const double mine = i < row.entries ? sums[i] : 0;
    const double running = running_sum(mine), below = before(running);
    const unsigned hits = __ballot_sync(kAllLanes, mine > 0 && left < passed + running);
    const unsigned some = __ballot_sync(kAllLanes, mine > 0);
    if (some) {
      const int lane = hits ? lowest_lane(hits) : highest_lane(some);
      entry = first + lane;
      start = passed + __shfl_sync(kAllLanes, below, lane);
    }
    if (hits) break;
    passed += __shfl_sync(kAllLanes, running, 31);
  }

  const float row_scale = scale_of(row_max, o);
  const double unit = power_of_two(scale_of(maxima[entry], o) - row_scale);
  left = fmax(left - start, 0.0) / unit;
  const Found found = find(row, o, entry, maxima[entry], floor, left);
  if (lane_id() == 0) {
    const float y = logit_of(found.x, o, row.origin);
    const double log2p = y * o.factor - row_scale - log2(total);
    write_row(o, n, found.place - row.lead, static_cast<float>(log2p < 0 ? log2p * kLn2 : 0));
  }
}

// One warp writes the first token whose logit is row_max.
template <class T>
QUIETSTAR_NOINLINE __device__ void take_largest(Row<T> row, const Options& o, std::int64_t n,
                                                const float* maxima, float row_max) {
  constexpr int kSize = Pack<T>::size;
  int entry = 0;
  for (int first = 0; first < row.entries; first += 32) {
    const int i = first + lane_id();
    const unsigned hits = __ballot_sync(kAllLanes, i < row.entries && maxima[i] == row_max);
    if (hits) {
      entry = first + lowest_lane(hits);
      break;
    }
  }
  const int stop = min((entry + 1) * o.per_entry, row.chunks);
  long long place = -1;
  for (int number = entry * o.per_entry; number < stop && place < 0; ++number) {
    Chunk<T> chunk;
    load_chunk(chunk, row, number, false);
    ban(chunk, o, row, number);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      int mine = -1;
#pragma unroll
      for (int k = kSize - 1; k >= 0; --k) {
        if (logit(chunk, i * kSize + k, o, row.origin) == row_max) mine = k;
      }
      const unsigned hits = __ballot_sync(kAllLanes, mine >= 0);
      if (hits && place < 0) {
        const int at =
            __shfl_sync(kAllLanes, place_in_chunk<T>(i * kSize) + mine, lowest_lane(hits));
        place = static_cast<long long>(number) * kChunk<T> + at;
      }
    }
  }
  if (lane_id() == 0) write_row(o, n, place - row.lead, 0);
}

}  // namespace quietstar::cuda::sampling
