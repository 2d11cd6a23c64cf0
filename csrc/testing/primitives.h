// Small kernels around the warp-wide functions of csrc/cuda/arch.cuh and reduce.cuh, one each, so
// that tests can hold their CPU versions against plain arithmetic.
#pragma once

#include <string>
#include <vector>

namespace quietstar::testing {

// D [16, 8] = A [16, 16] B [16, 8] of numbers rounded to the type "bf16", "f16" or (A [16, 8],
// B [8, 8]) "tf32"; matrices row by row. The 16-bit ones reach the registers by way of shared
// memory and load_matrices, B from its rows through load_matrices_t.
std::vector<float> run_matrix_product(const std::string& type, const std::vector<float>& a,
                                      const std::vector<float>& b);

// Of 32 values: their sum, their largest, a rotation by one lane, the exchange of neighbours, the
// sum within groups of eight, shuffled down and up by three, and the votes for values above 0;
// eight times 32 numbers.
std::vector<float> run_warp(const std::vector<float>& values);

// The sum over a block of 96 threads, and for every thread how many values are above 0; 2 x 96.
std::vector<float> run_block(const std::vector<float>& values);

// 64 numbers by way of asynchronous copies, two groups of 32; numbers from `valid` on are zeros.
std::vector<float> run_copies(const std::vector<float>& values, int valid);

// Each number to 16 bits, "bf16" or "f16", and back: alone, then packed in pairs.
std::vector<float> run_rounding(const std::string& type, const std::vector<float>& values);

// The sum of the first and the last of `floats` numbers of dynamic shared memory, beside 1 KiB of
// static shared memory, which both threads of the block fill with ones.
float run_shared_memory(int floats);

}  // namespace quietstar::testing
