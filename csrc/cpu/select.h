// Order statistics without SIMD. Compiled once, apart from the kernels: a std algorithm
// instantiated in a file with AVX-512 flags could be the copy that the linker keeps for every
// instruction set.
#pragma once

#include <cstdint>

namespace quietstar {

// The k-th largest of values[0, count), 1 <= k <= count. Reorders values.
float kth_largest(float* values, std::int64_t count, std::int64_t k);

// Largest first.
void sort_descending(float* values, std::int64_t count);

}  // namespace quietstar
