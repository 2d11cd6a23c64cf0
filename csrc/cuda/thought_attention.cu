// Checks, plan and launches of thought_attention on a device. The kernels are in
// thought_attention_{forward,merge,backward,row_gradients,key_gradients,slot_gradients}.cuh,
// compiled for each head size in a file of its own; what they share is in thought_attention.cuh and
// thought_attention_mma.cuh.
#include <algorithm>
#include <string>

#include "quietstar/checks.h"
#include "thought_attention.cuh"

namespace quietstar::cuda {
namespace {

using attention::Arguments;
using attention::Divider;
using attention::Scores;

constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;
// A split takes at least so many text keys, and there are at most so many splits.
constexpr std::int64_t kSplitKeys = 64, kMaxSplits = 128;
constexpr std::int64_t kMaxParts = 64;

// The kernels that take a call: those of a head size, the small ones where the others do not fit.
struct Kernels {
  int bytes, size;
  bool small;
};
Kernels kernels_for(DType dtype, std::int64_t head_size, const Device& device) {
  Kernels k{bytes_of(dtype), 256, false};
  if (head_size <= 128) k.size = 128;
  if (head_size <= 96 && k.bytes == 2) k.size = 96;
  if (head_size <= 64) k.size = 64;
  k.small = k.bytes == 2 && k.size == 256 &&
            attention::max_bytes(k.bytes, k.size, false) > max_shared_memory(device);
  return k;
}

Kernels check_on(const ThoughtAttention& call, const Device& device) {
  check(call);
  QUIETSTAR_ARGUMENT(call.head_size <= 256, "q has a head size of " +
                                                std::to_string(call.head_size) +
                                                "; the CUDA kernels take at most 256");
  const std::int64_t groups = call.q_heads / call.kv_heads;
  QUIETSTAR_ARGUMENT(
      call.num_thoughts * std::max<std::int64_t>(call.query_slots * groups, call.key_slots + 15) <
              kMaxRows &&
          call.text_length < kMaxRows && call.batch * call.kv_heads < kMaxRows,
      "q has " + std::to_string(call.num_thoughts) + " columns of " +
          std::to_string(call.query_slots) + " slots and k_text " +
          std::to_string(call.text_length) +
          " keys; the CUDA kernels take less than 2^30 rows and keys of a key head");
  const auto [needed, available] =
      thought_attention_shared_memory(call.dtype, call.head_size, device);
  QUIETSTAR_ARGUMENT(needed <= available,
                     "q has a head size of " + std::to_string(call.head_size) +
                         ", for which the kernels need " + std::to_string(needed) +
                         " bytes of shared memory in a block; the device has " +
                         std::to_string(available));
  return kernels_for(call.dtype, call.head_size, device);
}

// Tells whether the rows of a tensor can be read 16 bytes at a time.
class Extents {
 public:
  explicit Extents(const ThoughtAttention& call) : call_(call) {}
  bool rows_aligned(const AttentionTensor& t) const {
    return aligned(t, call_.q_heads, call_.query_slots, call_.num_thoughts);
  }
  bool slots_aligned(const AttentionTensor& t) const {
    return aligned(t, call_.kv_heads, call_.key_slots, call_.num_thoughts);
  }
  bool text_aligned(const AttentionTensor& t) const {
    return aligned(t, call_.kv_heads, call_.text_length, 1);
  }

 private:
  bool aligned(const AttentionTensor& t, std::int64_t heads, std::int64_t slots,
               std::int64_t columns) const {
    const std::int64_t bytes = bytes_of(call_.dtype);
    const auto fits = [&](std::int64_t extent, std::int64_t stride) {
      return extent <= 1 || stride * bytes % 16 == 0;
    };
    return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 &&
           call_.head_size * bytes % 16 == 0 && fits(call_.batch, t.batch) && fits(heads, t.head) &&
           fits(slots, t.slot) && fits(columns, t.column);
  }
  const ThoughtAttention& call_;
};

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
  a.num_thoughts = static_cast<int>(call.num_thoughts);
  a.text_length = static_cast<int>(call.text_length);
  a.size = static_cast<int>(call.head_size);
  const int column_rows = a.query_slots * a.groups;
  a.rows = a.num_thoughts * column_rows;
  a.pairs = static_cast<int>(call.batch * call.kv_heads);
  // Kernels take 16 slot keys at a time: where a column has many rows, its keys start a new group,
  // so that its rows multiply with no other column's. Where it has few, that would cost more.
  a.slot_stride = column_rows >= 16 ? (a.key_slots + 15) / 16 * 16 : a.key_slots;
  a.slot_keys = a.num_thoughts * a.slot_stride;
  a.slot_stride = std::max(a.slot_stride, 1);
  a.slot_window = static_cast<int>(call.window > 0 ? std::min(call.window, kMaxRows) : kMaxRows);
  a.by_rows = Divider::by(std::max(column_rows, 1));
  a.by_groups = Divider::by(std::max(a.groups, 1));
  a.by_slot_stride = Divider::by(a.slot_stride);
  a.by_pairs = Divider::by(std::max(a.pairs, 1));
  a.by_kv_heads = Divider::by(std::max(a.kv_heads, 1));
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
  const Extents of(call);
  a.q_aligned = of.rows_aligned(a.q);
  a.out_aligned = of.rows_aligned(a.out);
  a.keys_aligned = of.text_aligned(a.k_text) && of.text_aligned(a.v_text) &&
                   of.slots_aligned(a.k_thought) && of.slots_aligned(a.v_thought);
  a.splits = a.parts = 1;
  return a;
}

// Chooses the splits by the sizes and the device; returns the bytes of workspace.
std::int64_t plan_forward(Arguments& a, const Kernels& k, const Device& device, void* memory) {
  const std::int64_t all = static_cast<std::int64_t>(a.rows) * a.pairs;
  const attention::Shape shape = attention::forward_shape(k.bytes, k.size, k.small);
  const std::int64_t blocks = ceil_div(a.rows, shape.rows()) * a.pairs;
  const std::int64_t wanted = multiprocessors(device);
  if (blocks == 0 || blocks >= wanted) return 0;
  a.splits =
      static_cast<int>(std::min({ceil_div(2 * wanted, blocks), kMaxSplits,
                                 std::max<std::int64_t>(ceil_div(a.text_length, kSplitKeys), 1)}));
  if (a.splits == 1) return 0;
  a.split_out = static_cast<float*>(memory);
  a.split_lse = a.split_out + a.splits * all * k.size;
  return a.splits * all * (k.size + 1) * std::int64_t{sizeof(float)};
}

// The same for the backward pass: parts of the text's gradients.
std::int64_t plan_backward(Arguments& a, const Kernels& k, const Device& device, void* memory) {
  const attention::KeyShape shape = attention::key_gradient_shape(k.bytes, k.size, k.small);
  const std::int64_t batch = a.pairs / a.kv_heads, tiles = ceil_div(a.text_length, shape.keys());
  a.row_blocks = static_cast<int>(ceil_div(a.rows, shape.rows));
  const auto padded = [](std::int64_t bytes) { return ceil_div(bytes, 64) * 64; };
  const std::int64_t ranges = padded(batch * a.row_blocks * std::int64_t{sizeof(int2)});
  const std::int64_t always = ranges + padded(std::int64_t{attention::kRowConstants} * a.pairs *
                                              a.rows * std::int64_t{sizeof(int)});
  a.block_ranges = static_cast<int2*>(memory);
  a.row_constants = reinterpret_cast<int*>(static_cast<char*>(memory) + ranges);
  // Under a causal mask with a column at every position, tile i of n is seen by n - i as many rows
  // as the last one. So the longest block is not longer than what a multiprocessor has to do.
  const std::int64_t wanted = ceil_div(2 * std::int64_t{multiprocessors(device)},
                                       std::max<std::int64_t>(a.pairs, 1) * (tiles + 1));
  a.parts = static_cast<int>(
      std::max<std::int64_t>(std::min({wanted, kMaxParts, std::int64_t{a.row_blocks} / 2}), 1));
  if (a.parts == 1 || tiles == 0) {
    a.parts = 1;
    return always;
  }
  const std::int64_t part = static_cast<std::int64_t>(a.pairs) * a.text_length * k.size;
  a.dk_parts = reinterpret_cast<float*>(static_cast<char*>(memory) + always);
  a.dv_parts = a.dk_parts + a.parts * part;
  return always + 2 * a.parts * part * std::int64_t{sizeof(float)};
}

template <bool kBackward, class T, int kSize, bool kSmall = false>
void run_size(const Arguments& a, const Device& device) {
  if constexpr (kBackward) {
    attention::launch_backward<T, kSize, kSmall>(a, device);
  } else {
    attention::launch_forward<T, kSize, kSmall>(a, device);
  }
}

template <bool kBackward>
void run(const Arguments& a, DType dtype, const Kernels& k, const Device& device) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (k.size == 64) return run_size<kBackward, T, 64>(a, device);
    if constexpr (sizeof(T) == 2) {
      if (k.size == 96) return run_size<kBackward, T, 96>(a, device);
      if (k.small) return run_size<kBackward, T, 256, true>(a, device);
    }
    if (k.size == 128) return run_size<kBackward, T, 128>(a, device);
    run_size<kBackward, T, 256>(a, device);
  });
}

}  // namespace

std::array<std::int64_t, 2> thought_attention_shared_memory(DType dtype, std::int64_t head_size,
                                                            const Device& device) {
  const Kernels k = kernels_for(dtype, head_size, device);
  return {static_cast<std::int64_t>(attention::max_bytes(k.bytes, k.size, k.small)),
          static_cast<std::int64_t>(max_shared_memory(device))};
}

std::int64_t thought_attention_workspace(const ThoughtAttention& call, bool backward,
                                         const Device& device) {
  const Kernels kernels = check_on(call, device);
  Arguments a = arguments(call);
  const auto plan = backward ? plan_backward : plan_forward;
  return plan(a, kernels, device, nullptr);
}

void thought_attention(const ThoughtAttention& call, const Device& device) {
  const Kernels kernels = check_on(call, device);
  Arguments a = arguments(call);
  if (a.rows == 0 || a.pairs == 0) return;
  plan_forward(a, kernels, device, call.workspace);
  run<false>(a, call.dtype, kernels, device);
}

void thought_attention_backward(const ThoughtAttentionBackward& call, const Device& device) {
  const ThoughtAttention& forward = call.forward;
  const Kernels kernels = check_on(forward, device);
  Arguments a = arguments(forward);
  a.dout = call.dout;
  a.dlse = call.dlse;
  a.dq = call.dq;
  a.dk_text = call.dk_text;
  a.dv_text = call.dv_text;
  a.dk_thought = call.dk_thought;
  a.dv_thought = call.dv_thought;
  a.delta = call.delta;
  const Extents of(forward);
  a.dout_aligned = of.rows_aligned(a.dout);
  a.gradients_aligned = of.rows_aligned(a.dq) && of.text_aligned(a.dk_text) &&
                        of.text_aligned(a.dv_text) && of.slots_aligned(a.dk_thought) &&
                        of.slots_aligned(a.dv_thought);
  if (a.pairs == 0) return;
  plan_backward(a, kernels, device, forward.workspace);
  run<true>(a, forward.dtype, kernels, device);
}

}  // namespace quietstar::cuda
