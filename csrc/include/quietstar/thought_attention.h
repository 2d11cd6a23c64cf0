// Attention of thought slots over a range of text keys and over the slots of their own column.
//
// Query slot s (0 .. query_slots - 1) of column m has the depth s + 1 + key_slots - query_slots (0
// where there are no key slots) and sees
//   text key j      with text_start[m] <= j < text_stop[m], and
//   thought slot t  of column m, with t < depth.
// With a window, these are cut to j >= text_stop[m] + depth - window and t >= depth - window: to
// the last tokens of the chain of text and slots that ends with the row itself.
//
// With x = scale * q.k, turned into softcap * tanh(x / softcap) where there is a cap:
//   lse = log(sum exp(x) + exp(sink)),  out = sum exp(x - lse) v.
// A row that sees nothing and has no sink gets out = 0 and lse = -inf.
#pragma once

#include <array>
#include <cstdint>

#include "quietstar/device.h"
#include "quietstar/types.h"

namespace quietstar {

// Where element (b, h, s, m, d) lies: data + b * batch + h * head + s * slot + m * column + d, in
// elements. Text tensors [B, Hkv, N, D] use slot for the key and have column 0.
struct AttentionTensor {
  void* data;
  std::int64_t batch, head, slot, column;
};

struct ThoughtAttention {
  DType dtype;                // of q, keys, values, out and their gradients
  std::int64_t batch;         // B
  std::int64_t q_heads;       // Hq, a multiple of kv_heads
  std::int64_t kv_heads;      // Hkv
  std::int64_t query_slots;   // Sq
  std::int64_t key_slots;     // Sk >= Sq, or 0 with Sq = 1
  std::int64_t num_thoughts;  // M
  std::int64_t text_length;   // N
  std::int64_t head_size;     // D
  AttentionTensor q;          // [B, Hq, Sq, M, D]
  AttentionTensor k_text;     // [B, Hkv, N, D]
  AttentionTensor v_text;     // [B, Hkv, N, D]
  AttentionTensor k_thought;  // [B, Hkv, Sk, M, D]
  AttentionTensor v_thought;  // [B, Hkv, Sk, M, D]
  AttentionTensor out;        // [B, Hq, Sq, M, D]; written by forward, read by backward
  float* lse;                 // [B, Hq, Sq, M], natural log; written by forward, read by backward
  const std::int32_t* text_start;  // [B, M], any values
  const std::int32_t* text_stop;   // [B, M], any values, in any order; sorted is fastest
  const float* sinks;              // [Hq] or null
  double scale;
  std::int64_t window;  // tokens, the row's own among them; 0: none
  double softcap;       // 0: none
  int threads;          // >= 1; changes nothing in the results. CPU only
  bool tf32;            // fp32 products may round their operands to tf32. CUDA only
  void* workspace;      // thought_attention_workspace(...) bytes, aligned to 64
};

struct ThoughtAttentionBackward {
  ThoughtAttention forward;    // the same call; workspace of the size with backward = true
  AttentionTensor dout;        // [B, Hq, Sq, M, D]
  const float* dlse;           // [B, Hq, Sq, M] or null
  AttentionTensor dq;          // as q; this one and the next four are written
  AttentionTensor dk_text;     // as k_text
  AttentionTensor dv_text;     // as v_text
  AttentionTensor dk_thought;  // as k_thought
  AttentionTensor dv_thought;  // as v_thought
  float* delta;  // out [B, Hq, Sq, M]: sum(dout * out) - dlse, 0 for a row without any logit. The
                 // gradient of a sink is -sum(exp(sink - lse) * delta) over the rows of its head.
};

// Bytes of workspace for this call: data pointers are not looked at.
std::int64_t thought_attention_workspace(const ThoughtAttention& call, bool backward);

// Both throw std::invalid_argument for sizes or options out of range.
void thought_attention(const ThoughtAttention& call);
void thought_attention_backward(const ThoughtAttentionBackward& call);

namespace cuda {

// The same on a device, for head sizes up to 256. All pointers are the device's; nothing waits for
// it, and the plan depends on sizes and device alone, so that a call can be captured in a graph.
// Columns may come in any order; neighbours with near anchors are fastest.
std::int64_t thought_attention_workspace(const ThoughtAttention& call, bool backward,
                                         const Device& device);
void thought_attention(const ThoughtAttention& call, const Device& device);
void thought_attention_backward(const ThoughtAttentionBackward& call, const Device& device);

// Bytes of shared memory that a block of the kernels for these heads needs, of either pass, and
// what a block may have on the device. Where that is less, the functions above throw
// std::invalid_argument.
std::array<std::int64_t, 2> thought_attention_shared_memory(DType dtype, std::int64_t head_size,
                                                            const Device& device);

}  // namespace cuda
}  // namespace quietstar
