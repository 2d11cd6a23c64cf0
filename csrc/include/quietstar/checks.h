// Checks of arguments that the CPU and CUDA halves of an operator share. All throw
// std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>

#include "quietstar/linear_cross_entropy.h"
#include "quietstar/mixing_head.h"
#include "quietstar/sample_tokens.h"
#include "quietstar/thought_attention.h"

namespace quietstar {

// A macro, so that the message is made only where it is needed.
#define QUIETSTAR_ARGUMENT(condition, message)              \
  do {                                                      \
    if (!(condition)) throw std::invalid_argument(message); \
  } while (false)

inline void check(const SampleTokens& call) {
  const auto text = [](auto x) { return std::to_string(x); };
  QUIETSTAR_ARGUMENT(call.vocab >= 1 && call.vocab < (std::int64_t{1} << 31),
                     "logits has " + text(call.vocab) + " columns; expected 1 to 2^31 - 1");
  QUIETSTAR_ARGUMENT(
      call.temperature == 0 || (call.temperature >= 1e-30 && call.temperature <= 1e30),
      "temperature is " + text(call.temperature) + "; expected 0 or a number from 1e-30 to 1e30");
  QUIETSTAR_ARGUMENT(call.top_k >= 0, "top_k is " + text(call.top_k) + "; expected 0 or more");
  QUIETSTAR_ARGUMENT(call.top_p > 0 && call.top_p <= 1,
                     "top_p is " + text(call.top_p) + "; expected a number above 0 and up to 1");
  QUIETSTAR_ARGUMENT(call.min_p >= 0 && call.min_p <= 1,
                     "min_p is " + text(call.min_p) + "; expected a number from 0 to 1");
}

// max_vocab and min_stride: what the layout of the logits allows.
inline void check(const SoftmaxCrossEntropy& call, std::int64_t max_vocab,
                  std::int64_t min_stride) {
  const auto text = [](auto x) { return std::to_string(x); };
  QUIETSTAR_ARGUMENT(call.vocab >= 1 && call.vocab <= max_vocab,
                     "vocab is " + text(call.vocab) + "; expected 1 to " + text(max_vocab));
  QUIETSTAR_ARGUMENT(call.stride >= min_stride,
                     "stride is " + text(call.stride) + "; expected at least " + text(min_stride));
  QUIETSTAR_ARGUMENT(call.temperature > 0, "temperature is " + text(call.temperature) +
                                               "; expected a number greater than 0");
  QUIETSTAR_ARGUMENT(call.softcap >= 0,
                     "softcap is " + text(call.softcap) + "; expected 0 (none) or more");
}

inline void check(const MixingHead& call) {
  QUIETSTAR_ARGUMENT(call.width >= 1, "width is 0; expected at least 1");
  QUIETSTAR_ARGUMENT(call.index || call.rows == call.positions,
                     "base has " + std::to_string(call.positions) + " rows and thought " +
                         std::to_string(call.rows) + "; expected as many, or an index");
}

// Of ThoughtAttention and ThoughtDiagonal. keys: the tensor that q's heads are compared with.
template <class Call>
void check_heads_and_slots(const Call& call, const char* keys) {
  QUIETSTAR_ARGUMENT(
      call.batch >= 0 && call.num_thoughts >= 0 && call.query_slots >= 0 && call.key_slots >= 0,
      "a size is negative; expected 0 or more");
  QUIETSTAR_ARGUMENT(call.head_size >= 1, "q has a head size of 0; expected at least 1");
  QUIETSTAR_ARGUMENT(call.kv_heads >= 1 && call.q_heads >= 0 && call.q_heads % call.kv_heads == 0,
                     "q has " + std::to_string(call.q_heads) + " heads and " + keys + " " +
                         std::to_string(call.kv_heads) + "; expected q's to be a multiple of " +
                         keys + "'s");
  QUIETSTAR_ARGUMENT(
      call.key_slots >= call.query_slots || (call.key_slots == 0 && call.query_slots == 1),
      "k_thought has " + std::to_string(call.key_slots) + " slots and q has " +
          std::to_string(call.query_slots) +
          "; expected at least as many, or none with one query slot");
}

inline void check(const ThoughtAttention& call) {
  check_heads_and_slots(call, "k_text");
  QUIETSTAR_ARGUMENT(call.text_length >= 0, "a size is negative; expected 0 or more");
  QUIETSTAR_ARGUMENT(
      call.num_thoughts < (std::int64_t{1} << 31) && call.text_length < (std::int64_t{1} << 31),
      "q has " + std::to_string(call.num_thoughts) + " columns and k_text " +
          std::to_string(call.text_length) + " keys; expected less than 2^31");
  QUIETSTAR_ARGUMENT(call.window >= 0, "sliding_window is negative; expected 0 or more");
  QUIETSTAR_ARGUMENT(call.softcap >= 0, "softcap is negative; expected 0 or more");
}

}  // namespace quietstar
