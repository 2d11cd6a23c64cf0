// What csrc/cpu/sample_tokens.cpp hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "quietstar/sample_tokens.h"
#include "quietstar/simd.h"

namespace quietstar {

constexpr std::int64_t kBlock = 1024;  // elements per block: 4 KB of floats stay in L1
constexpr std::int64_t kGroups = 16;   // interleaved groups per block whose maxima are kept
constexpr std::int64_t kBins = 2048;   // of the histogram that finds the top_k and top_p thresholds

static inline std::int64_t block_count(std::int64_t vocab) {
  return (vocab + kBlock - 1) / kBlock;
}

// Banned ids, sorted, each once; those of block b are ids[first[b]] .. ids[first[b + 1] - 1].
struct BannedIds {
  const std::int32_t* ids;
  const std::int64_t* first;
};

// Memory of one thread, carved out of the caller's workspace.
struct Scratch {
  float* block;         // [kBlock] a block converted to float, with banned ids and the end at -inf
  float* bin_values;    // [kBlock]
  std::int32_t* bins;   // [kBlock]
  float* group_max;     // [blocks, kGroups]
  float* block_max;     // [blocks]
  double* block_sum;    // [blocks]
  double* block_scale;  // [blocks]
  float* survivors;     // [blocks * kBlock + kGroups]
  float* edge;          // [blocks * kBlock + kGroups]
  double* bin_mass;     // [kBins]
  std::int32_t* bin_count;  // [kBins]
};

QUIETSTAR_EACH_SIMD(
    // Rows [begin, end) of the call. Returns the first that cannot be sampled, or -1.
    std::int64_t sample_rows(const SampleTokens& call, const BannedIds& banned,
                             const Scratch& scratch, std::int64_t begin, std::int64_t end);)

}  // namespace quietstar
