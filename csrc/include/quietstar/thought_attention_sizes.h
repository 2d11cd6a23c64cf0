// The checks of sizes and options that the CPU and CUDA halves of thought_attention share.
#pragma once

#include <stdexcept>
#include <string>

#include "quietstar/thought_attention.h"

namespace quietstar {

// Throws std::invalid_argument.
inline void check_sizes(const ThoughtAttention& call) {
  const auto require = [](bool fine, const std::string& message) {
    if (!fine) throw std::invalid_argument(message);
  };
  require(call.batch >= 0 && call.columns >= 0 && call.text_length >= 0 && call.query_slots >= 0,
          "a size is negative; expected 0 or more");
  require(call.columns < (std::int64_t{1} << 31) && call.text_length < (std::int64_t{1} << 31),
          "q has " + std::to_string(call.columns) + " columns and k_text " +
              std::to_string(call.text_length) + " keys; expected less than 2^31");
  require(call.head_size >= 1, "q has a head size of 0; expected at least 1");
  require(call.kv_heads >= 1 && call.q_heads >= 0 && call.q_heads % call.kv_heads == 0,
          "q has " + std::to_string(call.q_heads) + " heads and k_text " +
              std::to_string(call.kv_heads) + "; expected q's to be a multiple of k_text's");
  require(call.key_slots >= call.query_slots || (call.key_slots == 0 && call.query_slots == 1),
          "k_thought has " + std::to_string(call.key_slots) + " slots and q has " +
              std::to_string(call.query_slots) +
              "; expected at least as many, or none with one query slot");
  require(call.window >= 0, "sliding_window is negative; expected 0 or more");
  require(call.softcap >= 0, "softcap is negative; expected 0 or more");
}

}  // namespace quietstar
