// One token per row of logits, drawn exactly from the categorical distribution
//   p = softmax(logits / temperature), without the banned ids,
//   then the top_k largest, then of those the fewest that hold top_p of their mass, then those with
//   p >= min_p * max p; renormalised. Tokens that tie with the last one kept are kept too.
// The draw inverts the cumulative sum in the order of the ids at one uniform number per row.
#pragma once

#include <cstdint>

#include "quietstar/device.h"
#include "quietstar/types.h"

namespace quietstar {

struct SampleTokens {
  const void* logits;       // [rows, vocab] of dtype; elements of a row lie side by side
  DType dtype;              // f32, bf16 or f16
  std::int64_t rows;        // >= 0
  std::int64_t vocab;       // 1 .. 2^31 - 1
  std::int64_t row_stride;  // elements from one row to the next
  double temperature;       // 0: the largest logit, the lowest id where several tie; else >= 1e-30
  std::int64_t top_k;       // 0: all
  double top_p;             // (0, 1]; 1: all
  double min_p;             // [0, 1]; 0: all
  const std::int64_t* banned;  // [banned_count] ids in [0, vocab), any order, repeats allowed
  std::int64_t banned_count;
  const std::int64_t* seed;  // [1] key of the generator, read when the kernel runs
  std::uint64_t offset;      // row n uses the counter offset + n
  std::int64_t* tokens;      // out [rows]; -1 for a row that cannot be sampled
  float* logprobs;  // out [rows], natural log of the probability under the distribution sampled
                    // from (0 at temperature 0); NaN for a row that cannot be sampled
  void* workspace;  // sample_tokens_workspace(...) bytes, aligned to 64
  int threads;      // >= 1; changes nothing in the results. CPU only
  // CUDA only: logits are scaled and capped while they are read, x * logit_scale, then
  // softcap * tanh(that / softcap).
  double logit_scale;
  double softcap;  // 0: none
};

// Bytes of workspace that sample_tokens needs.
std::int64_t sample_tokens_workspace(std::int64_t vocab, int threads);

// Returns the first row that cannot be sampled (it has a NaN or +inf, or nothing is left of it), or
// -1 where there is none. Throws std::invalid_argument for an argument out of range.
std::int64_t sample_tokens(const SampleTokens& call);

namespace cuda {

// Bytes of workspace that sample_tokens needs for up to so many rows; where that is 0, it may be
// null.
std::int64_t sample_tokens_workspace(DType dtype, std::int64_t rows, std::int64_t vocab,
                                     std::int64_t banned_count, const Device& device);

// As above, with all memory on the device. A row that cannot be sampled is marked in the outputs
// alone, and banned ids out of range are ignored: nobody waits for the device. Throws
// std::invalid_argument for an argument out of range, std::runtime_error where a launch fails.
void sample_tokens(const SampleTokens& call, const Device& device);

}  // namespace cuda
}  // namespace quietstar
