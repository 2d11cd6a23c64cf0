// Sampling of one token per row; what is computed stands in quietstar/sample_tokens.h.
//
// A row is read once, in blocks of 1024 elements that stay in L1: first their maximum, then the sum
// of 2^(x log2(e) / temperature - scale) with an integer scale per block, so that no exponent
// overflows and the argument of the power is never rounded. The uniform number picks a block by the
// running sum of the block sums; only that block is computed again, to find the token inside.
//   from memory: vocab elements per row; operations: about 14 vector instructions per 16 elements.
// Sums are kept in double: with 32000 tokens a float sum would move the edges between tokens so far
// that one draw in ten thousand differs from exact arithmetic.
//
// Truncation finds the smallest logit kept, without a sort, and repeats the sum with that floor:
//   1. a lower bound: the k-th largest of the maxima of 16 groups per block (there are k elements
//      at least as large), or for top_p the size below which all tokens together are too light
//      to matter;
//   2. the elements above it go into a histogram over their size (1/32 octave a bin), which gives
//      the bin of the threshold; only that bin's elements are sorted.
#include <cstdint>

#include "quietstar/philox.h"
#include "sample_tokens_blocks.h"
#include "sample_tokens_rows.h"
#include "select.h"
#include "vec.h"

namespace quietstar::QUIETSTAR_ISA {
namespace {

template <class T>
class RowSampler {
 public:
  RowSampler(const SampleTokens& call, const BannedIds& banned, const Scratch& scratch)
      : call_(call),
        memory_(scratch),
        row_{nullptr, call.vocab, banned, scratch.block},
        blocks_(block_count(call.vocab)),
        temperature_(call.temperature == 0 ? 1.0 : call.temperature),
        factor_(kLog2E / temperature_),
        factor2_(factor_) {}

  // Writes the token and its log-probability; false where the row cannot be sampled.
  bool sample(std::int64_t n) {
    row_.data = static_cast<const T*>(call_.logits) + n * call_.row_stride;
    row_.origin = 0;
    scan();
    // Past 2^22 the exponent x * factor has no bits left for a fraction; a difference has.
    if (max_ < kInf && __builtin_fabs(max_) * factor_ > 0x1p22) {
      row_.origin = max_;
      scan();
    }
    if (!(total_ > 0) || max_ == kInf) return false;  // NaN compares false, too
    if (call_.temperature == 0) {
      call_.tokens[n] = first_at(max_);
      call_.logprobs[n] = 0;
      return true;
    }
    float floor = kLowest;
    if (call_.top_p < 1 || call_.min_p > 0 || (call_.top_k > 0 && call_.top_k < call_.vocab)) {
      floor = truncation();
      rescan(floor);
    }
    draw(n, floor);
    return true;
  }

 private:
  // The one read of the row: maxima of the row, its blocks and groups, and the sums.
  void scan() {
    max_ = -kInf;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const float* x = row_.block(b);
      const std::int64_t count = row_.padded(b);
      Vec block_max = Vec::fill(-kInf);
      for (std::int64_t i = 0; i < count; i += kLanes) block_max = max(Vec::load(x + i), block_max);
      block_max.store(memory_.group_max + b * kGroups);
      memory_.block_max[b] = reduce_max(block_max);
      if (memory_.block_max[b] > max_) max_ = memory_.block_max[b];
      sum_block(b, x, count, kLowest);
    }
    combine();
  }

  // The sums again, of elements at or above floor.
  void rescan(float floor) {
    for (std::int64_t b = 0; b < blocks_; ++b) {
      memory_.block_sum[b] = 0;
      if (memory_.block_max[b] >= floor) sum_block(b, row_.block(b), row_.padded(b), floor);
    }
    combine();
  }

  // 2^(x factor - shift) for the elements of one block.
  struct BlockPower {
    TwoFloats factor;
    Vec shift, floor;
    Vec operator()(Vec x) const {
      return zero_where_below(exp2_of_product(x, factor, shift), x, floor);
    }
  };
  BlockPower power(float block_max, double scale, float floor) const {
    const auto lowest = static_cast<float>(block_max - kOctaves / factor_);
    return {factor2_, Vec::fill(static_cast<float>(scale)),
            Vec::fill(lowest > floor ? lowest : floor)};
  }

  void sum_block(std::int64_t b, const float* x, std::int64_t count, float floor) {
    float block_max = memory_.block_max[b];
    double scale = 0;
    if (block_max * factor_ > -0x1p23) {
      scale = __builtin_rint(block_max * factor_);
    } else {
      // Weighs nothing, as the row's maximum is above -2^22 (see sample). Only a NaN may count.
      block_max = 0;
      floor = 0;
    }
    const BlockPower power_of = power(block_max, scale, floor);
    DoubleSum sum;
    for (std::int64_t i = 0; i < count; i += kLanes) sum.add(power_of(Vec::load(x + i)));
    memory_.block_sum[b] = sum.total();
    memory_.block_scale[b] = scale;
  }

  // Brings the block sums to one scale and adds them up.
  void combine() {
    scale_ = -1e300;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      if (memory_.block_sum[b] > 0 && memory_.block_scale[b] > scale_) {
        scale_ = memory_.block_scale[b];
      }
    }
    total_ = 0;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      memory_.block_sum[b] *= power_of_two(memory_.block_scale[b] - scale_);
      total_ += memory_.block_sum[b];  // a NaN stays a NaN
    }
  }

  // 2^n for an integer n <= 0; 0 where that is no normal number.
  static double power_of_two(double n) {
    if (!(n > -1022)) return 0;
    const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(n) + 1023)
                               << 52;
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  std::int64_t first_at(float value) const {
    for (std::int64_t b = 0; b < blocks_; ++b) {
      if (memory_.block_max[b] != value) continue;
      const float* x = row_.block(b);
      for (std::int64_t i = 0;; ++i) {
        if (x[i] == value) return b * kBlock + i;
      }
    }
    return -1;
  }

  void draw(std::int64_t n, float floor) {
    double left = philox_uniform(static_cast<std::uint64_t>(*call_.seed),
                                 call_.offset + static_cast<std::uint64_t>(n)) *
                  total_;
    // Where rounding lets the search run off an end, the last candidate is taken.
    std::int64_t b = -1;
    for (std::int64_t i = 0; i < blocks_; ++i) {
      if (!(memory_.block_sum[i] > 0)) continue;
      b = i;
      if (left < memory_.block_sum[i]) break;
      left -= memory_.block_sum[i];
    }
    left /= power_of_two(memory_.block_scale[b] - scale_);

    constexpr std::int64_t kStep = 4 * kLanes;
    const float* x = row_.block(b);
    const std::int64_t count = row_.padded(b);
    const BlockPower power_of = power(memory_.block_max[b], memory_.block_scale[b], floor);
    std::int64_t token = -1;
    bool found = false;
    for (std::int64_t i = 0; i < count && !found; i += kStep) {
      const std::int64_t end = smaller(i + kStep, count);
      float e[kStep];
      DoubleSum sum;
      for (std::int64_t j = i; j < end; j += kLanes) {
        const Vec powers = power_of(Vec::load(x + j));
        powers.store(e + (j - i));
        sum.add(powers);
      }
      const double step = sum.total();
      if (left >= step && i + kStep < count) {
        // Remember a candidate only: the last of these that can be drawn.
        for (std::int64_t j = end; step > 0 && j-- > i;) {
          if (e[j - i] > 0) {
            token = j;
            break;
          }
        }
        left -= step;
        continue;
      }
      for (std::int64_t j = i; j < end && !found; ++j) {
        if (!(e[j - i] > 0)) continue;
        token = j;
        found = left < e[j - i];
        left -= e[j - i];
      }
    }
    const double log2p = x[token] * factor_ - scale_ - __builtin_log2(total_);
    call_.tokens[n] = b * kBlock + token;
    call_.logprobs[n] = static_cast<float>(log2p < 0 ? log2p * kLn2 : 0);
  }

  // The smallest logit that top_k, top_p and min_p keep.
  float truncation() {
    float floor = kLowest;
    const std::int64_t top_k = call_.top_k < call_.vocab ? call_.top_k : 0;
    if (top_k > 0 || call_.top_p < 1) floor = rank_and_mass(top_k);
    if (call_.min_p > 0) {
      const double bound = max_ + temperature_ * __builtin_log(call_.min_p);
      auto rounded = static_cast<float>(bound);
      if (rounded < bound) rounded = __builtin_nextafterf(rounded, kInf);
      if (rounded > floor) floor = rounded;
    }
    return floor;
  }

  float rank_and_mass(std::int64_t top_k) {
    const std::int64_t survivors = collect(lower_bound(top_k));
    fill_histogram(survivors);
    std::int64_t last_bin = kBins - 1;
    float floor = kLowest;
    double mass = total_;
    if (top_k > 0 && top_k <= survivors) {
      std::int64_t bin = 0, above = 0;
      mass = 0;
      for (; above + memory_.bin_count[bin] < top_k; ++bin) {
        above += memory_.bin_count[bin];
        mass += memory_.bin_mass[bin];
      }
      const std::int64_t count = collect_bin(bin, survivors, kLowest);
      floor = kth_largest(memory_.edge, count, top_k - above);
      for (std::int64_t i = 0; i < count; ++i) {
        if (memory_.edge[i] >= floor) mass += mass_of(memory_.edge[i]);
      }
      last_bin = bin;
    }
    if (call_.top_p >= 1) return floor;
    const double goal = call_.top_p * mass;
    double above = 0;
    std::int64_t bin = 0;
    for (; bin < last_bin && above + memory_.bin_mass[bin] < goal; ++bin) {
      above += memory_.bin_mass[bin];
    }
    const std::int64_t count = collect_bin(bin, survivors, floor);
    sort_descending(memory_.edge, count);
    for (std::int64_t i = 0; i < count; ++i) {
      floor = memory_.edge[i];
      above += mass_of(floor);
      if (above >= goal) break;
    }
    return floor;
  }

  // A value that the threshold of top_k (of top_p where top_k is 0) is certainly not below.
  float lower_bound(std::int64_t top_k) {
    double bound = -kInf;
    const std::int64_t groups = blocks_ * kGroups;
    if (top_k > 0 && top_k <= groups) {
      std::memcpy(memory_.edge, memory_.group_max, sizeof(float) * groups);
      bound = kth_largest(memory_.edge, groups, top_k);
    } else if (top_k == 0) {
      // Tokens lighter than (1 - top_p) total / vocab weigh less than 1 - top_p together.
      const double lightest = (1 - call_.top_p) * total_ / static_cast<double>(call_.vocab);
      bound = (__builtin_log2(lightest) + scale_ - 1e-3) / factor_;
    }
    return bound > kLowest ? static_cast<float>(bound) : kLowest;
  }

  std::int64_t collect(float low) {
    std::int64_t count = 0;
    const Vec floor = Vec::fill(low);
    for (std::int64_t b = 0; b < blocks_; ++b) {
      if (!(memory_.block_max[b] >= low)) continue;
      const float* x = row_.block(b);
      const std::int64_t end = row_.padded(b);
      for (std::int64_t i = 0; i < end; i += kLanes) {
        count += append_at_least(memory_.survivors + count, Vec::load(x + i), floor);
      }
    }
    return count;
  }

  // Bins of survivors [begin, end), at most kBlock of them. Monotone in the value, as rounding is.
  void find_bins(std::int64_t begin, std::int64_t end) {
    const auto factor = static_cast<float>(factor_ * kBinsPerOctave);
    const float row_max = max_;
    const float* x = memory_.survivors + begin;
    std::int32_t* bins = memory_.bins;
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const float bin = (row_max - x[i]) * factor;
      bins[i] = static_cast<std::int32_t>(bin < kBins - 1 ? bin : kBins - 1);
    }
  }

  void fill_histogram(std::int64_t survivors) {
    std::memset(memory_.bin_mass, 0, sizeof(double) * kBins);
    std::memset(memory_.bin_count, 0, sizeof(std::int32_t) * kBins);
    // Vectors past the end compute something; their results are not used.
    Vec::fill(max_).store(memory_.survivors + survivors);
    const BlockPower power_of = power(max_, scale_, kLowest);
    for (std::int64_t begin = 0; begin < survivors; begin += kBlock) {
      const std::int64_t end = smaller(begin + kBlock, survivors);
      find_bins(begin, end);
      for (std::int64_t i = begin; i < end; i += kLanes) {
        power_of(Vec::load(memory_.survivors + i)).store(memory_.bin_values + (i - begin));
      }
      for (std::int64_t i = 0; i < end - begin; ++i) {
        memory_.bin_mass[memory_.bins[i]] += memory_.bin_values[i];
        memory_.bin_count[memory_.bins[i]] += 1;
      }
    }
  }

  // Copies the survivors of a bin that are >= floor to edge.
  std::int64_t collect_bin(std::int64_t bin, std::int64_t survivors, float floor) {
    std::int64_t count = 0;
    for (std::int64_t begin = 0; begin < survivors; begin += kBlock) {
      const std::int64_t end = smaller(begin + kBlock, survivors);
      find_bins(begin, end);
      for (std::int64_t i = begin; i < end; ++i) {
        const float x = memory_.survivors[i];
        memory_.edge[count] = x;
        count += memory_.bins[i - begin] == bin && x >= floor;
      }
    }
    return count;
  }

  double mass_of(float x) const { return __builtin_exp2(x * factor_ - scale_); }

  const SampleTokens& call_;
  const Scratch& memory_;
  Row<T> row_;
  std::int64_t blocks_;
  double temperature_;
  double factor_;      // log2(e) / temperature
  TwoFloats factor2_;  // the same
  float max_ = 0;      // of the row
  double total_ = 0;   // sum of 2^(x factor - scale)
  double scale_ = 0;
};

}  // namespace

std::int64_t sample_rows(const SampleTokens& call, const BannedIds& banned, const Scratch& scratch,
                         std::int64_t begin, std::int64_t end) {
  return with_type(call.dtype, [&](auto type) {
    std::int64_t bad = -1;
    RowSampler<decltype(type)> sampler(call, banned, scratch);
    for (std::int64_t n = begin; n < end; ++n) {
      if (sampler.sample(n)) continue;
      call.tokens[n] = -1;
      call.logprobs[n] = __builtin_nanf("");
      if (bad < 0) bad = n;
    }
    return bad;
  });
}

}  // namespace quietstar::QUIETSTAR_ISA
