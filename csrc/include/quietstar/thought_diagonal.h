// The slot part of thought_attention alone, merged with a text part that another kernel computed.
//
// Query slot s of column m sees the thought slots t of the same column with t < s + 1 + key_slots -
// query_slots; there is no window. With x = scale * q.k over them, and the text part's out_text and
// lse_text:
//   lse = log(sum exp(x) + exp(lse_text) + exp(sink))
//   out = sum exp(x - lse) v + exp(lse_text - lse) out_text
// A row that sees nothing and has no sink gets out = 0 and lse = -inf.
//
// The gradients of the text part follow from the merged out and lse by any attention backward that
// takes both; what is left for the slot part is added to its dq here.
#pragma once

#include <cstdint>

#include "quietstar/device.h"
#include "quietstar/thought_attention.h"

namespace quietstar::cuda {

// Head sizes up to this.
constexpr std::int64_t kMaxDiagonalSize = 256;

// Tensors are addressed as in thought_attention.h; lse, text_lse and delta are fp32 [B, Hq, Sq, M].
struct ThoughtDiagonal {
  DType dtype;                // of q, keys, values, outputs and their gradients
  std::int64_t batch;         // B
  std::int64_t q_heads;       // Hq, a multiple of kv_heads
  std::int64_t kv_heads;      // Hkv
  std::int64_t query_slots;   // Sq
  std::int64_t key_slots;     // Sk >= Sq, or 0 with Sq = 1
  std::int64_t num_thoughts;  // M
  std::int64_t head_size;     // D
  AttentionTensor q;          // [B, Hq, Sq, M, D]
  AttentionTensor k_thought;  // [B, Hkv, Sk, M, D]
  AttentionTensor v_thought;  // [B, Hkv, Sk, M, D]
  AttentionTensor text_out;   // [B, Hq, Sq, M, D], or data null: there is no text
  AttentionTensor text_lse;   // natural log; not looked at without text_out
  AttentionTensor out;        // [B, Hq, Sq, M, D]; written by forward, read by backward
  AttentionTensor lse;        // natural log; written by forward, read by backward
  const float* sinks;         // [Hq] or null
  double scale;
};

struct ThoughtDiagonalBackward {
  ThoughtDiagonal forward;     // the same call; text_out, text_lse and sinks are not looked at
  AttentionTensor dout;        // [B, Hq, Sq, M, D]
  AttentionTensor text_dq;     // [B, Hq, Sq, M, D], added to dq; or data null
  AttentionTensor dq;          // as q; this one and the next two are written
  AttentionTensor dk_thought;  // as k_thought
  AttentionTensor dv_thought;  // as v_thought
  AttentionTensor delta;       // out: sum(dout * out)
};

// Both throw std::invalid_argument for sizes out of range, and std::runtime_error where a launch
// fails.
void thought_diagonal(const ThoughtDiagonal& call, const Device& device);
void thought_diagonal_backward(const ThoughtDiagonalBackward& call, const Device& device);

}  // namespace quietstar::cuda
