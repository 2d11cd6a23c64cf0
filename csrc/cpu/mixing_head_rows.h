// What csrc/cpu/mixing_head.cpp hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "quietstar/mixing_head.h"
#include "quietstar/simd.h"

namespace quietstar {

// Each works on rows [begin, end) of the call, mixing_positions_backward on positions.
QUIETSTAR_EACH_SIMD(
    void mixing_first_rows(const MixingHead& call, std::int64_t begin, std::int64_t end);
    void mixing_tail_rows(const MixingHead& call, std::int64_t begin, std::int64_t end);
    // Adds to grad_b2 and grad_w3 [width].
    void mixing_tail_rows_backward(const MixingHead& call, std::int64_t begin, std::int64_t end,
                                   float* grad_b2, float* grad_w3);
    // The rows of position p are order[first[p]] .. order[first[p + 1] - 1]. Adds grad_b1 to
    // sums [width], behind which there are [2, width] of scratch.
    void mixing_positions_backward(const MixingHead& call, const std::int64_t* first,
                                   const std::int64_t* order, std::int64_t begin, std::int64_t end,
                                   float* sums);)

}  // namespace quietstar
