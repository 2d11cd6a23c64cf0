// Attention of thought slots to the slots of their own column, merged with the text part (see
// quietstar/thought_diagonal.h): the half that a stock attention kernel cannot do.
//
// Work: a column is a small dense triangle, (Sq x Hq / Hkv) rows x Sk keys. bf16 and fp16 run on
// the matrix units: up to 16 slots, heads up to 128 wide and 56 of them to a key head a block per
// column and key head, by way of shared memory (..._staged*.cuh); others a warp per 16 rows
// forward, a block per column and key head backward (..._forward.cuh, ..._backward.cuh). fp32 and
// what is not aligned run a warp per row (..._plain.cuh).
//
// Bytes: per row of D numbers, forward reads q and the text part and writes out; backward reads q,
// dout, out and the text's dq and writes dq. Per slot and key head k and v, backward dk and dv
// besides. The staged kernels read each once; of the others, what neighbouring warps read again
// comes from the cache.
//
// Operations, per row: 4 D Sk forward, 10 D Sk backward. With Sk = 15 and bf16 that is some 10 per
// byte: the kernels wait for memory.
#include <algorithm>
#include <string>

#include "launch.cuh"
#include "quietstar/checks.h"
#include "quietstar/thought_diagonal.h"
#include "thought_diagonal_backward.cuh"
#include "thought_diagonal_forward.cuh"
#include "thought_diagonal_plain.cuh"
#include "thought_diagonal_staged_backward.cuh"
#include "thought_diagonal_staged_forward.cuh"

namespace quietstar::cuda {
namespace {

constexpr std::int64_t kMaxTasks = (std::int64_t{1} << 31) - 1;

void check_on_device(const ThoughtDiagonal& call) {
  check_heads_and_slots(call, "k_thought");
  QUIETSTAR_ARGUMENT(call.head_size <= kMaxDiagonalSize,
                     "q has a head size of " + std::to_string(call.head_size) + "; expected 1 to " +
                         std::to_string(kMaxDiagonalSize));
  QUIETSTAR_ARGUMENT(call.batch * call.num_thoughts * std::max(call.q_heads, call.kv_heads) *
                             std::max(call.query_slots, call.key_slots) <=
                         kMaxTasks,
                     "q has too many rows; expected less than 2^31");
}

bool is_aligned(const AttentionTensor& t, std::int64_t heads, std::int64_t slots,
                const ThoughtDiagonal& call) {
  const auto whole = [](std::int64_t extent, std::int64_t stride) {
    return extent <= 1 || stride % 8 == 0;
  };
  return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && whole(call.batch, t.batch) &&
         whole(heads, t.head) && whole(slots, t.slot) && whole(call.num_thoughts, t.column);
}
bool rows_aligned(const AttentionTensor& t, const ThoughtDiagonal& call) {
  return is_aligned(t, call.q_heads, call.query_slots, call);
}
bool keys_aligned(const AttentionTensor& t, const ThoughtDiagonal& call) {
  return is_aligned(t, call.kv_heads, call.key_slots, call);
}
bool takes_matrix_units(const ThoughtDiagonal& call) {
  return call.dtype != DType::f32 && call.head_size % 8 == 0 && rows_aligned(call.q, call) &&
         rows_aligned(call.out, call) && keys_aligned(call.k_thought, call) &&
         keys_aligned(call.v_thought, call);
}

// Columns under a key head, and the rows of one.
unsigned columns_of(const ThoughtDiagonal& call) {
  return static_cast<unsigned>(call.batch * call.num_thoughts * call.kv_heads);
}
unsigned rows_of(const ThoughtDiagonal& call) {
  return static_cast<unsigned>(call.q_heads / call.kv_heads * call.query_slots);
}

// Whether the rows of a column and key head lie less than 2^32 bytes apart. The address of a row
// past the end, which nobody reads, may be another one's.
bool is_near(const AttentionTensor& t, std::int64_t heads, std::int64_t slots) {
  constexpr std::int64_t kFar = std::int64_t{1} << 30;  // elements
  const auto reach = [](std::int64_t extent, std::int64_t stride) {
    return stride >= 0 && stride < kFar ? extent * stride : kFar;
  };
  return reach(heads, t.head) + reach(slots, t.slot) < kFar;
}

// Whether the place of a slot that is not there is aligned, too: its address is computed all the
// same, and the stride of a single slot may be anything.
template <class... Tensors>
bool packs_apart(const Tensors&... of_heads) {
  return (... && (of_heads.slot % 8 == 0));
}

// Whether the slots of a column are one tile, rows are found by numbers of 32 bits, and shared
// memory holds two blocks that need so much.
template <class... Tensors>
bool takes_staged(const ThoughtDiagonal& call, const Device& device, std::size_t bytes,
                  const Tensors&... of_rows) {
  const std::int64_t groups = call.q_heads / call.kv_heads;
  return call.key_slots <= diagonal::kTile && call.head_size <= 128 && groups <= 56 &&
         2 * bytes <= max_shared_memory(device) &&
         (... && is_near(of_rows, groups, call.query_slots)) &&
         is_near(call.k_thought, 1, call.key_slots) && is_near(call.v_thought, 1, call.key_slots) &&
         packs_apart(call.q, call.out, call.text_out, call.k_thought, call.v_thought);
}

// Of a call, in which q takes the place of what is not there: addresses are computed all the same.
diagonal::Staging staging_of(ThoughtDiagonal& call, AttentionTensor& text) {
  const auto by = [](std::int64_t n) {
    return attention::Divider::by(std::max<std::int64_t>(n, 1));
  };
  const auto groups = static_cast<unsigned>(call.q_heads / call.kv_heads);
  const bool has_text = text.data != nullptr;
  if (!has_text) text = call.q;
  if (call.key_slots == 0) call.k_thought = call.v_thought = call.q;
  return {by(call.kv_heads),
          by(call.num_thoughts),
          static_cast<int>(rows_of(call)),
          groups,
          (1u << 16) / std::max(groups, 1u) + 1,
          has_text};
}
int staged_warps(const ThoughtDiagonal& call) {
  return static_cast<int>(
      std::min<std::int64_t>(ceil_div(rows_of(call), diagonal::kTile), diagonal::kStagedWarps));
}

template <class T, int kSize>
void forward_staged(ThoughtDiagonal call, const Device& device) {
  const int warps = staged_warps(call);
  const diagonal::Staging staging = staging_of(call, call.text_out);
  launch("thought_diagonal (staged)", device, diagonal::diagonal_forward_staged<T, kSize>,
         blocks(columns_of(call)), dim3(static_cast<unsigned>(32 * warps)),
         diagonal::staged_forward_bytes<kSize>(warps), call, staging);
}

template <class T, int kSize>
void backward_staged(ThoughtDiagonalBackward back, const Device& device) {
  const int warps = staged_warps(back.forward);
  const diagonal::Staging staging = staging_of(back.forward, back.text_dq);
  launch("thought_diagonal_backward (staged)", device, diagonal::diagonal_backward_staged<T, kSize>,
         blocks(columns_of(back.forward)), dim3(static_cast<unsigned>(32 * warps)),
         diagonal::staged_backward_bytes<kSize>(warps), back, staging);
}

template <class T, int kSize>
void forward_tiles(const ThoughtDiagonal& call, const Device& device) {
  const auto tiles = static_cast<unsigned>(ceil_div(rows_of(call), diagonal::kTile));
  const unsigned tasks = columns_of(call) * tiles;
  launch("thought_diagonal", device, diagonal::diagonal_forward<T, kSize>,
         blocks(tasks, diagonal::kForwardWarps), dim3(32 * diagonal::kForwardWarps), 0, call, tiles,
         tasks);
}

template <class T, int kSize>
void backward_tiles(const ThoughtDiagonalBackward& back, const Device& device) {
  launch("thought_diagonal_backward", device, diagonal::diagonal_backward<T, kSize>,
         blocks(columns_of(back.forward)), dim3(32 * diagonal::kBackwardWarps<kSize>), 0, back);
}

template <class T>
void forward_plain(const ThoughtDiagonal& call, const Device& device) {
  using namespace diagonal_plain;
  const unsigned rows = rows_of(call), tasks = columns_of(call) * rows;
  launch("thought_diagonal (plain)", device, diagonal_forward_plain<T>, blocks(tasks, kWarps),
         dim3(32 * kWarps), 0, call, rows, tasks);
}

template <class T>
void backward_plain(const ThoughtDiagonalBackward& back, const Device& device) {
  using namespace diagonal_plain;
  const unsigned rows = rows_of(back.forward), tasks = columns_of(back.forward) * rows;
  launch("thought_diagonal_backward dq (plain)", device, diagonal_dq_plain<T>,
         blocks(tasks, kWarps), dim3(32 * kWarps), 0, back, rows, tasks);
  const auto keys = columns_of(back.forward) * static_cast<unsigned>(back.forward.key_slots);
  launch("thought_diagonal_backward dk dv (plain)", device, diagonal_dkv_plain<T>,
         blocks(keys, kWarps), dim3(32 * kWarps), 0, back, static_cast<int>(rows), keys);
}

}  // namespace

void thought_diagonal(const ThoughtDiagonal& call, const Device& device) {
  check_on_device(call);
  const bool tiles =
      takes_matrix_units(call) && (!call.text_out.data || rows_aligned(call.text_out, call));
  const bool narrow = call.head_size <= 64;
  constexpr int kWarps = diagonal::kStagedWarps;
  const std::size_t bytes = narrow ? diagonal::staged_forward_bytes<64>(kWarps)
                                   : diagonal::staged_forward_bytes<128>(kWarps);
  const bool staged = tiles && takes_staged(call, device, bytes, call.q, call.out, call.text_out,
                                            call.lse, call.text_lse);
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (staged && narrow) return forward_staged<T, 64>(call, device);
      if (staged) return forward_staged<T, 128>(call, device);
      if (tiles && call.head_size <= 64) return forward_tiles<T, 64>(call, device);
      if (tiles && call.head_size <= 128) return forward_tiles<T, 128>(call, device);
      if (tiles) return forward_tiles<T, 256>(call, device);
    }
    forward_plain<T>(call, device);
  });
}

void thought_diagonal_backward(const ThoughtDiagonalBackward& back, const Device& device) {
  const ThoughtDiagonal& call = back.forward;
  check_on_device(call);
  const bool tiles = takes_matrix_units(call) && rows_aligned(back.dout, call) &&
                     rows_aligned(back.dq, call) &&
                     (!back.text_dq.data || rows_aligned(back.text_dq, call)) &&
                     keys_aligned(back.dk_thought, call) && keys_aligned(back.dv_thought, call);
  const bool narrow = call.head_size <= 64;
  constexpr int kWarps = diagonal::kStagedWarps;
  const std::size_t bytes = narrow ? diagonal::staged_backward_bytes<64>(kWarps)
                                   : diagonal::staged_backward_bytes<128>(kWarps);
  const bool staged = tiles &&
                      takes_staged(call, device, bytes, call.q, call.out, call.lse, back.dout,
                                   back.text_dq, back.dq, back.delta) &&
                      packs_apart(back.dout, back.text_dq, back.dq) &&
                      is_near(back.dk_thought, 1, call.key_slots) &&
                      is_near(back.dv_thought, 1, call.key_slots);
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (staged && narrow) return backward_staged<T, 64>(back, device);
      if (staged) return backward_staged<T, 128>(back, device);
      if (tiles && call.head_size <= 64) return backward_tiles<T, 64>(back, device);
      if (tiles && call.head_size <= 128) return backward_tiles<T, 128>(back, device);
      if (tiles) return backward_tiles<T, 256>(back, device);
    }
    backward_plain<T>(back, device);
  });
}

}  // namespace quietstar::cuda
