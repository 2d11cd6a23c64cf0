// Softmax cross entropy of a tile of logits, in place: the step between the matrix products of
// linear_cross_entropy.
//   y[v, r]   = cap(logit_scale x[v, r]) / temperature,   cap(a) = softcap tanh(a / softcap)
//   nll[r]    = log sum over v not banned of exp(y[v, r])  -  y[target[r], r]
//   x[v, r]  <- row_weight[r] d nll[r] / d x[v, r]
// On the CPU, logits are token-major: those of one token for all rows lie side by side. A vector
// then holds sixteen rows, no sum runs across its lanes, a banned token is left out as a whole, and
// the matrix products of this layout are the faster ones (see
// quietstar_ext/linear_cross_entropy/cpu.py).
#pragma once

#include <cstdint>

#include "quietstar/device.h"
#include "quietstar/types.h"

namespace quietstar {

struct SoftmaxCrossEntropy {
  void* logits;                 // of dtype; the products x, then the gradient
  DType dtype;                  // f32, bf16 or f16
  std::int64_t rows;            // >= 0
  std::int64_t vocab;           // >= 1; on CUDA below 2^31 - 65536
  std::int64_t stride;          // elements from one token to the next, >= rows; on CUDA from one
                                // row to the next, >= vocab
  const std::int64_t* targets;  // [rows] ids
  double temperature;           // > 0
  double softcap;               // 0: none
  double logit_scale;
  float* nll;                // out [rows]; inf where the target is banned
  const float* row_weights;  // [rows]; null on CUDA: the loss alone, the logits stay as they are
  // CPU only
  std::int64_t first_token;    // id of token 0, where the tile is a part of the vocabulary
  const std::int64_t* banned;  // [banned_count] ids, any order, repeats and others allowed
  std::int64_t banned_count;
  float* largest;   // [rows] max of y over the tokens; written by the loss, read by the gradient
  float* total;     // [rows] sum of exp(y - largest); likewise
  void* workspace;  // softmax_cross_entropy_workspace(...) bytes, aligned to 64
  int threads;      // >= 1; changes nothing in the results
  // CUDA only
  const unsigned char* valid_rows;   // [rows] or null; one with 0 has nll 0, gradient 0, isn't read
  const std::uint32_t* banned_bits;  // a bit per token, as banned_tokens leaves them, or null
};

// Bytes of workspace that either function needs.
std::int64_t softmax_cross_entropy_workspace(std::int64_t rows, std::int64_t vocab);

// largest, total and nll of a tile that holds the whole vocabulary. The logits stay as they are.
// Throws std::invalid_argument for an argument out of range.
void softmax_cross_entropy_loss(const SoftmaxCrossEntropy& call);

// The gradient, in place of the logits, from largest and total. The tile may be any part of the
// vocabulary (a target outside has no element in it); nll is not used.
void softmax_cross_entropy_gradient(const SoftmaxCrossEntropy& call);

namespace cuda {

// The same in one pass on a device, for logits of whole rows that lie row by row: nll, and the
// gradient in place of the logits. A target outside 0 .. vocab-1 makes its row NaN. Throws
// std::invalid_argument for an argument out of range.
void softmax_cross_entropy(const SoftmaxCrossEntropy& call, const Device& device);

// Sets the bits of the tokens in ids [count] (any order, repeats allowed, those outside
// 0 .. vocab-1 are passed over). mask [vocab / 32 + 2] is zero on entry: bit v % 32 of element
// v / 32 is token v.
void banned_tokens(const std::int64_t* ids, std::int64_t count, std::int64_t vocab,
                   std::uint32_t* mask, const Device& device);

// data[i] *= *factor for a factor in device memory. A factor of 1 is found out there, and then
// nothing is moved.
void scale_in_place(void* data, DType dtype, std::int64_t count, const float* factor,
                    const Device& device);

}  // namespace cuda
}  // namespace quietstar
