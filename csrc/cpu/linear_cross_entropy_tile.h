// What csrc/cpu/linear_cross_entropy.cpp hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "quietstar/linear_cross_entropy.h"
#include "quietstar/simd.h"

namespace quietstar {

// Tokens [begin, end) of a tile, and which of them are banned (sorted, each once, relative to token
// 0).
struct TokenBlock {
  std::int64_t begin, end;
  const std::int64_t* banned;
  std::int64_t banned_count;
};

QUIETSTAR_EACH_SIMD(
    // Per row: the largest y of the block and the sum of exp(y - largest) over its tokens. Both
    // arrays are padded to a multiple of 16 rows.
    void softmax_block_sums(const SoftmaxCrossEntropy& call, const TokenBlock& block,
                            float* largest, float* sums);
    // Replaces the block's logits by factor[r] exp(y - largest[r]) dy/dx, for all but the targets'
    // elements right (those still miss their -1). Arrays padded as above.
    void softmax_block_gradient(const SoftmaxCrossEntropy& call, const TokenBlock& block,
                                const float* largest, const float* factor);
    // y at every row's target, and its derivative; arrays padded, undefined outside the tile.
    void softmax_targets(const SoftmaxCrossEntropy& call, float* y, float* slope);
    // Writes values[r] over the element of row r's target where use[r].
    void softmax_put_targets(const SoftmaxCrossEntropy& call, const float* values,
                             const char* use);)

}  // namespace quietstar
