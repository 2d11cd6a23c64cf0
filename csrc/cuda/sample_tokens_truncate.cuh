// The smallest logit that top_k, top_p and min_p keep, without a sort.
//
// Floats are mapped to integers in the same order, their keys. The key sought is the largest one at
// which count(>= key) reaches top_k, or mass(>= key) reaches top_p of the mass. It is found digit
// by digit, 11 bits at a time: a pass over the row puts the elements whose upper bits agree into a
// histogram in shared memory, count and mass, and the bin in which the running sum from the top
// reaches the goal is the next digit. Two passes for 16-bit logits, three for fp32, each only over
// entries whose maximum is large enough to matter, and out of L2 mostly.
// The masses are 64-bit integers, so that the order in which threads add changes nothing.
#pragma once

#include "sample_tokens_sum.cuh"

namespace quietstar::cuda::sampling {

constexpr int kBins = 2048;
constexpr int kThreads = 256;  // of a block that truncates
using Fixed = unsigned long long;

// Dynamic shared memory of a block that truncates.
struct Bins {
  unsigned count[kBins], mass_low[kBins], mass_high[kBins];
  Fixed part_mass[kThreads];
  unsigned part_count[kThreads];
  float bound;
  // Where the search stands.
  unsigned prefix;       // digits found so far
  unsigned count_above;  // of elements above the prefix
  Fixed mass;            // of the same
  Fixed mass_with_bin;   // of these and of the ones that have the prefix
  Fixed goal;
  int digit_bits;
  bool reached;
};

__device__ __forceinline__ unsigned key_of(float y) {
  const unsigned bits = __float_as_uint(y + 0.0f);  // -0 and 0 are one value
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Bits of a digit of the key and below it.
struct Digit {
  int bits, shift;
};
__device__ __forceinline__ Digit digit_of(int level) {
  return level == 0 ? Digit{11, 21} : level == 1 ? Digit{11, 10} : Digit{10, 0};
}

// One element into the bin of its digit. Out of line, or it would stand 64 times in every kernel.
QUIETSTAR_NOINLINE __device__ inline void put(Bins& bins, unsigned bin, Fixed mass) {
  atomicAdd(&bins.count[bin], 1u);
  const auto low = static_cast<unsigned>(mass);
  const unsigned old = atomicAdd(&bins.mass_low[bin], low);
  const unsigned high = static_cast<unsigned>(mass >> 32) + (old + low < old ? 1 : 0);
  if (high) atomicAdd(&bins.mass_high[bin], high);
}

// Elements >= bound that have the digits found so far, into the bins of the next one.
template <class T>
__device__ __forceinline__ void fill(Bins& bins, const Row<T>& row, const Options& o, int level,
                                     const float* maxima, float row_max, float bound,
                                     bool with_mass) {
  const ExactPower power(row_max, o);
  const Digit digit = digit_of(level);
  const unsigned prefix = bins.prefix;
  // A shift by 32 is undefined; there is no digit above the first.
  const auto agrees = [&](unsigned key) {
    return level == 0 || key >> digit.shift >> digit.bits == prefix;
  };
  for (int entry = static_cast<int>(threadIdx.x / 32); entry < row.entries;
       entry += static_cast<int>(blockDim.x / 32)) {
    const float max_logit = maxima[entry];
    if (!(max_logit >= bound)) continue;
    if (level > 0 && key_of(max_logit) >> digit.shift >> digit.bits < prefix) continue;
    const int stop = min((entry + 1) * o.per_entry, row.chunks);
    for (int number = entry * o.per_entry; number < stop; ++number) {
      Chunk<T> chunk;
      load_chunk(chunk, row, number, false);
      ban(chunk, o, row, number);
      for_logits(chunk, o, row.origin, [&](int, float y) {
        const unsigned key = key_of(y);
        if (!(y >= bound) || !agrees(key)) return;
        const unsigned bin = key >> digit.shift & ((1u << digit.bits) - 1);
        const double mass = with_mass ? static_cast<double>(power.above(y, kLowest)) * o.unit : 0;
        put(bins, bin, static_cast<Fixed>(mass + 0.5));
      });
    }
  }
}

__device__ __forceinline__ Fixed mass_in(const Bins& bins, int bin) {
  return static_cast<Fixed>(bins.mass_high[bin]) << 32 | bins.mass_low[bin];
}

// Finds the digit at which the count or the mass from the top reaches bins.goal. Parts are numbered
// from the top: part t holds the bins kBins - 1 - t * kPer and the kPer - 1 below.
__device__ __forceinline__ void choose_digit(Bins& bins, bool by_mass) {
  constexpr int kPer = kBins / kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  Fixed mass = 0;
  unsigned count = 0;
  for (int j = thread * kPer; j < (thread + 1) * kPer; ++j) {
    mass += mass_in(bins, kBins - 1 - j);
    count += bins.count[kBins - 1 - j];
  }
  bins.part_mass[thread] = mass;
  bins.part_count[thread] = count;
  __syncthreads();
  if (thread < 32) {
    constexpr int kParts = kThreads / 32;
    mass = 0;
    count = 0;
    for (int t = thread * kParts; t < (thread + 1) * kParts; ++t) {
      mass += bins.part_mass[t];
      count += bins.part_count[t];
    }
    const Fixed own_mass = mass;
    const unsigned own_count = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const Fixed other_mass = __shfl_up_sync(kAllLanes, mass, step);
      const unsigned other_count = __shfl_up_sync(kAllLanes, count, step);
      if (thread >= step) {
        mass += other_mass;
        count += other_count;
      }
    }
    const Fixed goal = bins.goal;
    const bool passes = (by_mass ? bins.mass + mass : bins.count_above + count) >= goal;
    const unsigned hits = __ballot_sync(kAllLanes, passes);
    __syncwarp();  // every lane has read what one of them writes now
    if (hits == 0) {
      if (thread == 31) {
        bins.reached = false;
        bins.mass_with_bin = bins.mass + mass;
      }
    } else if (thread == __ffs(static_cast<int>(hits)) - 1) {
      Fixed above = bins.mass + (mass - own_mass);
      unsigned above_count = bins.count_above + (count - own_count);
      for (int j = thread * kParts * kPer;; ++j) {
        const int bin = kBins - 1 - j;
        const Fixed next = above + mass_in(bins, bin);
        const unsigned next_count = above_count + bins.count[bin];
        if ((by_mass ? next : next_count) >= goal) {
          bins.prefix = bins.prefix << bins.digit_bits | static_cast<unsigned>(bin);
          bins.mass = above;
          bins.mass_with_bin = next;
          bins.count_above = above_count;
          break;
        }
        above = next;
        above_count = next_count;
      }
    }
  }
  __syncthreads();
}

// The largest logit at which the goal is reached, -inf where it never is. bins.mass_with_bin is the
// mass from there up.
template <class T>
QUIETSTAR_NOINLINE __device__ float search(Bins& bins, Row<T> row, const Options& o,
                                           const float* maxima, float row_max, float bound,
                                           bool by_mass, Fixed goal, bool with_mass) {
  // The lower bits of 16-bit logits say nothing.
  const int levels = sizeof(T) == 2 && !o.transformed && row.origin == 0 ? 2 : 3;
  __syncthreads();
  if (threadIdx.x == 0) {
    bins.prefix = 0;
    bins.mass = 0;
    bins.mass_with_bin = 0;
    bins.count_above = 0;
    bins.goal = goal;
    bins.reached = true;
  }
  for (int level = 0; level < levels; ++level) {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) {
      bins.count[i] = bins.mass_low[i] = bins.mass_high[i] = 0;
    }
    if (threadIdx.x == 0) bins.digit_bits = digit_of(level).bits;
    __syncthreads();
    fill(bins, row, o, level, maxima, row_max, bound, with_mass);
    __syncthreads();
    choose_digit(bins, by_mass);
    if (!bins.reached) return -kInf;
  }
  return value_of(bins.prefix << digit_of(levels - 1).shift);
}

// A logit that the threshold of top_k is not below: there are top_k entries whose maxima are as
// large.
__device__ __forceinline__ float bound_of_rank(Bins& bins, int entries, const float* maxima,
                                               std::int64_t rank) {
  if (rank > entries) return kLowest;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    const float mine = maxima[i];
    int larger = 0;
    for (int j = 0; j < entries; ++j) {
      larger += maxima[j] > mine || (maxima[j] == mine && j < i) ? 1 : 0;
    }
    if (larger == rank - 1) bins.bound = mine;
  }
  __syncthreads();
  return fmaxf(bins.bound, kLowest);
}

// Every thread of the block calls it; sums are weighed (see draw).
template <class T>
QUIETSTAR_NOINLINE __device__ float smallest_kept(Bins& bins, Row<T> row, const Options& o,
                                                  const double* sums, const float* maxima,
                                                  float row_max) {
  float floor = kLowest;
  if (o.top_k > 0) {
    const float bound = bound_of_rank(bins, row.entries, maxima, o.top_k);
    const float found = search(bins, row, o, maxima, row_max, bound, false,
                               static_cast<Fixed>(o.top_k), o.top_p < 1);
    floor = fmaxf(found, kLowest);
  }
  if (o.top_p < 1) {
    float bound = floor;
    double mass;
    if (o.top_k > 0) {
      mass = static_cast<double>(bins.mass_with_bin);
    } else {
      double total = 0;
      for (int i = 0; i < row.entries; ++i) total += sums[i];
      mass = total * o.unit;
      // Tokens lighter than (1 - top_p) total / vocab weigh less than 1 - top_p together.
      const double lightest = (1 - o.top_p) * total / static_cast<double>(o.vocab);
      const double least = (log2(lightest) + scale_of(row_max, o) - 1e-3) / o.factor;
      if (least > kLowest) bound = static_cast<float>(least);
    }
    const Fixed goal = static_cast<Fixed>(fmax(ceil(o.top_p * mass), 1.0));
    const float found = search(bins, row, o, maxima, row_max, bound, true, goal, true);
    floor = fmaxf(found, floor);
  }
  const double least = row_max + o.min_p_shift;
  if (least > floor) {
    floor = static_cast<float>(least);
    if (floor < least) floor = nextafterf(floor, kInf);
  }
  return floor;
}

}  // namespace quietstar::cuda::sampling
