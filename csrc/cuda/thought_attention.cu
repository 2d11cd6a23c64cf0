// Checks, plan and launches of thought_attention on a device. The kernels are in
// thought_attention_{forward,merge,row_gradients,key_gradients}.cuh, each compiled for some head
// sizes in a file of its own, and what they share in thought_attention.cuh.
#include <algorithm>
#include <string>

#include "quietstar/thought_attention_sizes.h"
#include "thought_attention.cuh"

namespace quietstar::cuda {
namespace {

using attention::Arguments;
using attention::Divider;
using attention::Scores;

constexpr std::int64_t kMost = std::int64_t{1} << 30;
// A split takes at least so many text keys, and there are at most so many splits.
constexpr std::int64_t kSplitKeys = 64, kMostSplits = 128;

std::int64_t over(std::int64_t n, std::int64_t d) {
  return (n + d - 1) / d;
}

int element_bytes(const ThoughtAttention& call) {
  return call.dtype == DType::f32 ? 4 : 2;
}

// The head size whose kernels take the call.
int kernel_size(const ThoughtAttention& call) {
  if (call.head_size <= 64) return 64;
  if (call.head_size <= 96 && call.dtype != DType::f32) return 96;
  return call.head_size <= 128 ? 128 : 256;
}

void check(const ThoughtAttention& call) {
  check_sizes(call);
  const auto require = [](bool fine, const std::string& message) {
    if (!fine) throw std::invalid_argument(message);
  };
  require(call.head_size <= 256, "q has a head size of " + std::to_string(call.head_size) +
                                     "; the CUDA kernels take at most 256");
  const std::int64_t groups = call.q_heads / call.kv_heads;
  require(call.columns * std::max<std::int64_t>(call.query_slots * groups, call.key_slots + 15) <
                  kMost &&
              call.text_length < kMost && call.batch * call.kv_heads < kMost,
          "q has " + std::to_string(call.columns) + " columns of " +
              std::to_string(call.query_slots) + " slots and k_text " +
              std::to_string(call.text_length) +
              " keys; the CUDA kernels take less than 2^30 rows and keys of a key head");
}

// Whether 16 bytes can be read at a time. extents: B, heads, slots or keys, columns.
bool is_aligned(const AttentionTensor& t, std::int64_t bytes, std::int64_t size,
                const std::int64_t (&extents)[4]) {
  const std::int64_t strides[4] = {t.batch, t.head, t.slot, t.column};
  bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && size * bytes % 16 == 0;
  for (int i = 0; i < 4; ++i)
    aligned = aligned && (extents[i] <= 1 || strides[i] * bytes % 16 == 0);
  return aligned;
}

// Everything but the workspace.
Arguments arguments(const ThoughtAttention& call) {
  Arguments a{};
  a.q = call.q;
  a.k_text = call.k_text;
  a.v_text = call.v_text;
  a.k_thought = call.k_thought;
  a.v_thought = call.v_thought;
  a.out = call.out;
  a.lse = call.lse;
  a.text_start = call.text_start;
  a.text_stop = call.text_stop;
  a.sinks = call.sinks;
  a.window = call.window;
  a.q_heads = static_cast<int>(call.q_heads);
  a.kv_heads = static_cast<int>(call.kv_heads);
  a.groups = a.q_heads / a.kv_heads;
  a.query_slots = static_cast<int>(call.query_slots);
  a.key_slots = static_cast<int>(call.key_slots);
  a.columns = static_cast<int>(call.columns);
  a.text_length = static_cast<int>(call.text_length);
  a.size = static_cast<int>(call.head_size);
  const int column_rows = a.query_slots * a.groups;
  a.rows = a.columns * column_rows;
  a.pairs = static_cast<int>(call.batch * call.kv_heads);
  // Kernels take 16 slot keys at a time: where a column has many rows, its keys start a new group,
  // so that its rows multiply with no other column's. Where it has few, that would cost more.
  a.slot_stride = column_rows >= 16 ? (a.key_slots + 15) / 16 * 16 : a.key_slots;
  a.slot_keys = a.columns * a.slot_stride;
  a.slot_stride = std::max(a.slot_stride, 1);
  a.by_rows = Divider::by(std::max(column_rows, 1));
  a.by_groups = Divider::by(std::max(a.groups, 1));
  a.by_slot_stride = Divider::by(a.slot_stride);
  a.scale = static_cast<float>(call.scale);
  constexpr double kLog2E = 1.4426950408889634;
  if (call.softcap > 0) {
    a.scores = Scores::capped;
    a.inner = static_cast<float>(call.scale / call.softcap);
    a.outer = static_cast<float>(call.softcap * kLog2E);
  } else {
    a.scores = call.scale < 0 ? Scores::negative : Scores::plain;
    // 0 times the -inf of a masked key would be NaN.
    a.outer = std::max(static_cast<float>(std::abs(call.scale) * kLog2E), 1e-30f);
  }
  a.precise = !call.tf32;
  const std::int64_t bytes = element_bytes(call), size = call.head_size;
  const std::int64_t rows[4] = {call.batch, call.q_heads, call.query_slots, call.columns};
  const std::int64_t slots[4] = {call.batch, call.kv_heads, call.key_slots, call.columns};
  const std::int64_t text[4] = {call.batch, call.kv_heads, call.text_length, 1};
  a.q_aligned = is_aligned(a.q, bytes, size, rows);
  a.out_aligned = is_aligned(a.out, bytes, size, rows);
  a.keys_aligned =
      is_aligned(a.k_text, bytes, size, text) && is_aligned(a.v_text, bytes, size, text) &&
      is_aligned(a.k_thought, bytes, size, slots) && is_aligned(a.v_thought, bytes, size, slots);
  a.splits = a.parts = 1;
  return a;
}

// Chooses the splits by the sizes and the device; returns the bytes of workspace.
std::int64_t plan_forward(Arguments& a, int bytes, int size, const Device& device, void* memory) {
  const std::int64_t all = static_cast<std::int64_t>(a.rows) * a.pairs;
  const std::int64_t blocks = over(a.rows, attention::forward_shape(bytes, size).rows()) * a.pairs;
  const std::int64_t wanted = multiprocessors(device);
  if (blocks == 0 || blocks >= wanted) return 0;
  a.splits =
      static_cast<int>(std::min({over(2 * wanted, blocks), kMostSplits,
                                 std::max<std::int64_t>(over(a.text_length, kSplitKeys), 1)}));
  if (a.splits == 1) return 0;
  a.split_out = static_cast<float*>(memory);
  a.split_lse = a.split_out + a.splits * all * size;
  return a.splits * all * (size + 1) * std::int64_t{sizeof(float)};
}

template <class T>
void forward(const Arguments& a, int size, const Device& device) {
  switch (size) {
    case 64:
      return attention::launch_forward<T, 64>(a, device);
    case 96:
      if constexpr (sizeof(T) == 2) return attention::launch_forward<T, 96>(a, device);
      break;
    case 128:
      return attention::launch_forward<T, 128>(a, device);
    default:
      return attention::launch_forward<T, 256>(a, device);
  }
}

}  // namespace

std::int64_t thought_attention_workspace(const ThoughtAttention& call, bool backward,
                                         const Device& device) {
  check(call);
  Arguments a = arguments(call);
  (void)backward;
  return plan_forward(a, element_bytes(call), kernel_size(call), device, nullptr);
}

void thought_attention(const ThoughtAttention& call, const Device& device) {
  check(call);
  Arguments a = arguments(call);
  const int size = kernel_size(call);
  if (a.rows == 0 || a.pairs == 0) return;
  plan_forward(a, element_bytes(call), size, device, call.workspace);
  switch (call.dtype) {
    case DType::bf16:
      return forward<BFloat16>(a, size, device);
    case DType::f16:
      return forward<Float16>(a, size, device);
    default:
      return forward<float>(a, size, device);
  }
}

}  // namespace quietstar::cuda
