// Sums of 2^(y log2(e) / temperature - scale) over the chunks of a row, two ways:
// - exact: the element's power by the polynomial of csrc/cpu on the product that is not rounded, to
//   one unit in the last place, added up in double: what the CPU kernel computes;
// - fast (sample_tokens_fast.cuh): one instruction of the special-function unit and sums in fp32.
#pragma once

#include "sample_tokens_row.cuh"

namespace quietstar::cuda::sampling {

// Elements that many octaves below the largest one of their chunk or entry weigh nothing.
constexpr double kOctaves = 100;
// Beyond |y factor| = 2^22 the exponent has no bits left for a fraction. Rows whose maximum is near
// are shifted by it (Row::origin); chunks below weigh nothing in the others.
constexpr float kMaxExponent = 0x1p22f, kShiftedFrom = 0x1p21f;

__device__ __forceinline__ float scale_of(float max_logit, const Options& o) {
  return rintf(fminf(fmaxf(max_logit * o.hi, -kMaxExponent), kMaxExponent));
}
__device__ __forceinline__ bool has_weight(float max_logit, const Options& o) {
  return max_logit * o.hi > -kMaxExponent + 200;
}

// 2^n for an integer n; 0 where that is no normal number.
__device__ __forceinline__ double power_of_two(float n) {
  if (!(n > -1022)) return 0;
  const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<int>(n) + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^(y factor - scale) for an entry whose largest logit is `max_logit`.
struct ExactPower {
  float hi, lo, lowest;
  unsigned shift;

  __device__ __forceinline__ ExactPower(float max_logit, const Options& o)
      : hi(o.hi),
        lo(o.lo),
        lowest(static_cast<float>(max_logit - o.reach)),
        shift(static_cast<unsigned>(static_cast<int>(scale_of(max_logit, o))) << 23) {}

  // Logits under `lowest` count as that: 2^-100.
  __device__ __forceinline__ float operator()(float y) const {
    y = fmaxf(y, lowest);
    // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits.
    const float magic = 12582912.0f;
    const float moved = fmaf(y, hi, magic);
    float r = fmaf(y, hi, -(moved - magic));
    r = fmaf(y, lo, r);
    // 2^r for |r| <= 1/2 is 1 + r P(r), the coefficients of csrc/cpu/vec.h.
    float p = 1.535336194e-04f;
    p = fmaf(p, r, 1.339887440e-03f);
    p = fmaf(p, r, 9.618437357e-03f);
    p = fmaf(p, r, 5.550332471e-02f);
    p = fmaf(p, r, 2.402264791e-01f);
    p = fmaf(p, r, 6.931472029e-01f);
    p = fmaf(p, r, 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(moved) << 23) - shift);
  }
  // The same, and 0 for a logit under floor.
  __device__ __forceinline__ float above(float y, float floor) const {
    return y >= fmaxf(floor, lowest) ? (*this)(y) : 0;
  }
};

// Of logits >= floor; the sum of all lanes.
template <class T>
__device__ __forceinline__ double exact_sum(const Chunk<T>& chunk, float max_logit,
                                            const Options& o, float origin, float floor) {
  const ExactPower power(max_logit, o);
  double sum[2] = {0, 0};
  if (floor > kLowest) {
    for_logits(chunk, o, origin,
               [&](int j, float y) { sum[j % 2] += static_cast<double>(power.above(y, floor)); });
  } else {
    for_logits(chunk, o, origin,
               [&](int j, float y) { sum[j % 2] += static_cast<double>(power(y)); });
  }
  return warp_reduce(sum[0] + sum[1], Sum{});
}

// Maximum and sum of an entry, the sum in units of 2^scale_of(max_logit).
struct Entry {
  float max_logit;
  double sum;

  __device__ __forceinline__ void add(float max_in_chunk, double chunk_sum, const Options& o) {
    const float before = max_logit;
    max_logit = max_nan(max_logit, max_in_chunk);
    const float scale = scale_of(max_logit, o);
    sum = sum * power_of_two(scale_of(before, o) - scale) +
          chunk_sum * power_of_two(scale_of(max_in_chunk, o) - scale);
  }
};

// The first pass over the entries [first, last) of a row by the warps of a block. Entry i goes to
// sums[i] and maxima[i]. The next chunk is under way while one is worked on.
template <class T>
__device__ __forceinline__ void scan(const Row<T>& row, const Options& o, int first, int last,
                                     double* sums, float* maxima) {
  const int warps = static_cast<int>(blockDim.x / 32);
  int entry = first + static_cast<int>(threadIdx.x / 32);
  int number = entry * o.per_entry;
  const bool once = !o.truncated;
  Chunk<T> next;
  if (entry < last) load_chunk(next, row, number, once);
  Entry sum{-kInf, 0};
  while (entry < last) {
    Chunk<T> chunk = next;
    const int stop = min((entry + 1) * o.per_entry, row.chunks);
    const bool closes = number + 1 >= stop;
    const int next_entry = closes ? entry + warps : entry;
    const int next_number = closes ? next_entry * o.per_entry : number + 1;
    if (next_entry < last) load_chunk(next, row, next_number, once);

    ban(chunk, o, row, number);
    const float max_logit = chunk_max(chunk, o, row.origin);
    double powers = 0;
    if (o.first_sums && has_weight(max_logit, o)) {
      powers = exact_sum(chunk, max_logit, o, row.origin, kLowest);
    }
    if (o.per_entry == 1) {
      sum = {max_logit, powers};
    } else {
      sum.add(max_logit, powers, o);
    }
    if (closes) {
      if (lane_id() == 0) {
        sums[entry] = sum.sum;
        maxima[entry] = sum.max_logit;
      }
      sum = {-kInf, 0};
    }
    entry = next_entry;
    number = next_number;
  }
}

// The sums again, exact, of the logits at or above floor, in entries that have one: sums[i]. With
// `renew` the maxima are found again, too (for another origin).
template <class T>
QUIETSTAR_NOINLINE __device__ void rescan(Row<T> row, const Options& o, float floor, bool renew,
                                          double* sums, float* maxima) {
  const int warps = static_cast<int>(blockDim.x / 32);
  for (int entry = static_cast<int>(threadIdx.x / 32); entry < row.entries; entry += warps) {
    Entry sum{-kInf, 0};
    const float known = maxima[entry];
    if (renew || known >= floor) {
      const int stop = min((entry + 1) * o.per_entry, row.chunks);
      for (int number = entry * o.per_entry; number < stop; ++number) {
        Chunk<T> chunk;
        load_chunk(chunk, row, number, false);
        ban(chunk, o, row, number);
        const float max_logit = chunk_max(chunk, o, row.origin);
        double powers = 0;
        if (has_weight(max_logit, o) && max_logit >= floor) {
          powers = exact_sum(chunk, max_logit, o, row.origin, floor);
        }
        if (o.per_entry == 1) {
          sum = {max_logit, powers};
        } else {
          sum.add(max_logit, powers, o);
        }
      }
    }
    __syncwarp();  // every lane has read maxima[entry]
    if (lane_id() == 0) {
      sums[entry] = sum.sum;
      maxima[entry] = sum.max_logit;
    }
  }
}

}  // namespace quietstar::cuda::sampling
