// Attention of thought slots to the slots of their own column, merged with the text part (see
// quietstar/thought_diagonal.h): the half that a stock attention kernel cannot do.
//
// Work: a column is a small dense triangle, (Sq x Hq / Hkv) rows x Sk keys. bf16 and fp16 run on
// the matrix units, a warp per 16 rows forward, a block per column and key head backward
// (..._forward.cuh, ..._backward.cuh); fp32 and what is not aligned run a warp per row
// (..._plain.cuh).
// Bytes: per row of D numbers, forward reads q and the text part and writes out; backward reads q,
// dout, out and the text's dq and writes dq. Per slot and key head k and v, backward dk and dv
// besides. What neighbouring warps read again comes from the cache.
// Operations, per row: 4 D Sk forward, 10 D Sk backward. With Sk = 15 and bf16 that is some 10 per
// byte: the kernels wait for memory.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "quietstar/thought_diagonal.h"
#include "thought_diagonal_backward.cuh"
#include "thought_diagonal_forward.cuh"
#include "thought_diagonal_plain.cuh"

namespace quietstar::cuda {
namespace {

constexpr std::int64_t kMostTasks = (std::int64_t{1} << 31) - 1;

void require(bool fine, const std::string& message) {
  if (!fine) throw std::invalid_argument(message);
}

void check(const ThoughtDiagonal& call) {
  require(call.batch >= 0 && call.columns >= 0 && call.query_slots >= 0 && call.key_slots >= 0,
          "a size is negative; expected 0 or more");
  require(call.head_size >= 1 && call.head_size <= kMostDiagonalSize,
          "q has a head size of " + std::to_string(call.head_size) + "; expected 1 to " +
              std::to_string(kMostDiagonalSize));
  require(call.kv_heads >= 1 && call.q_heads >= 0 && call.q_heads % call.kv_heads == 0,
          "q has " + std::to_string(call.q_heads) + " heads and k_thought " +
              std::to_string(call.kv_heads) + "; expected q's to be a multiple of k_thought's");
  require(call.key_slots >= call.query_slots || (call.key_slots == 0 && call.query_slots == 1),
          "k_thought has " + std::to_string(call.key_slots) + " slots and q has " +
              std::to_string(call.query_slots) +
              "; expected at least as many, or none with one query slot");
  require(call.batch * call.columns * std::max(call.q_heads, call.kv_heads) *
                  std::max(call.query_slots, call.key_slots) <=
              kMostTasks,
          "q has too many rows; expected less than 2^31");
}

bool is_aligned(const AttentionTensor& t, std::int64_t heads, std::int64_t slots,
                const ThoughtDiagonal& call) {
  const auto whole = [](std::int64_t extent, std::int64_t stride) {
    return extent <= 1 || stride % 8 == 0;
  };
  return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && whole(call.batch, t.batch) &&
         whole(heads, t.head) && whole(slots, t.slot) && whole(call.columns, t.column);
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

unsigned blocks_for(unsigned tasks, int per_block) {
  return (tasks + per_block - 1) / per_block;
}

template <class T, int kSize>
void forward_tiles(const ThoughtDiagonal& call, const Device& device) {
  const auto rows = static_cast<unsigned>(call.q_heads / call.kv_heads * call.query_slots);
  const unsigned tiles = blocks_for(rows, diagonal::kTile);
  const auto tasks = static_cast<unsigned>(call.batch * call.columns * call.kv_heads) * tiles;
  launch("thought_diagonal", device, diagonal::diagonal_forward<T, kSize>,
         dim3(blocks_for(tasks, diagonal::kForwardWarps)), dim3(32 * diagonal::kForwardWarps), 0,
         call, tiles, tasks);
}

template <class T, int kSize>
void backward_tiles(const ThoughtDiagonalBackward& back, const Device& device) {
  const ThoughtDiagonal& call = back.forward;
  const auto blocks = static_cast<unsigned>(call.batch * call.columns * call.kv_heads);
  launch("thought_diagonal_backward", device, diagonal::diagonal_backward<T, kSize>, dim3(blocks),
         dim3(32 * diagonal::kBackwardWarps<kSize>), 0, back);
}

template <class T>
void forward_plain(const ThoughtDiagonal& call, const Device& device) {
  using namespace diagonal_plain;
  const auto rows = static_cast<unsigned>(call.q_heads / call.kv_heads * call.query_slots);
  const auto tasks = static_cast<unsigned>(call.batch * call.columns * call.kv_heads) * rows;
  launch("thought_diagonal (plain)", device, diagonal_forward_plain<T>,
         dim3(blocks_for(tasks, kWarps)), dim3(32 * kWarps), 0, call, rows, tasks);
}

template <class T>
void backward_plain(const ThoughtDiagonalBackward& back, const Device& device) {
  using namespace diagonal_plain;
  const ThoughtDiagonal& call = back.forward;
  const auto columns = static_cast<unsigned>(call.batch * call.columns * call.kv_heads);
  const auto rows = static_cast<unsigned>(call.q_heads / call.kv_heads * call.query_slots);
  launch("thought_diagonal_backward dq (plain)", device, diagonal_dq_plain<T>,
         dim3(blocks_for(columns * rows, kWarps)), dim3(32 * kWarps), 0, back, rows,
         columns * rows);
  const auto keys = columns * static_cast<unsigned>(call.key_slots);
  launch("thought_diagonal_backward dk dv (plain)", device, diagonal_dkv_plain<T>,
         dim3(blocks_for(keys, kWarps)), dim3(32 * kWarps), 0, back, static_cast<int>(rows), keys);
}

}  // namespace

void thought_diagonal(const ThoughtDiagonal& call, const Device& device) {
  check(call);
  if (takes_matrix_units(call) &&
      (call.text_out.data == nullptr || rows_aligned(call.text_out, call))) {
    const auto run = [&](auto type) {
      using T = decltype(type);
      if (call.head_size <= 64) return forward_tiles<T, 64>(call, device);
      if (call.head_size <= 128) return forward_tiles<T, 128>(call, device);
      return forward_tiles<T, 256>(call, device);
    };
    return call.dtype == DType::bf16 ? run(BFloat16{}) : run(Float16{});
  }
  if (call.dtype == DType::f32) return forward_plain<float>(call, device);
  if (call.dtype == DType::bf16) return forward_plain<BFloat16>(call, device);
  return forward_plain<Float16>(call, device);
}

void thought_diagonal_backward(const ThoughtDiagonalBackward& back, const Device& device) {
  const ThoughtDiagonal& call = back.forward;
  check(call);
  if (takes_matrix_units(call) && rows_aligned(back.dout, call) && rows_aligned(back.dq, call) &&
      (back.text_dq.data == nullptr || rows_aligned(back.text_dq, call)) &&
      keys_aligned(back.dk_thought, call) && keys_aligned(back.dv_thought, call)) {
    const auto run = [&](auto type) {
      using T = decltype(type);
      if (call.head_size <= 64) return backward_tiles<T, 64>(back, device);
      if (call.head_size <= 128) return backward_tiles<T, 128>(back, device);
      return backward_tiles<T, 256>(back, device);
    };
    return call.dtype == DType::bf16 ? run(BFloat16{}) : run(Float16{});
  }
  if (call.dtype == DType::f32) return backward_plain<float>(back, device);
  if (call.dtype == DType::bf16) return backward_plain<BFloat16>(back, device);
  return backward_plain<Float16>(back, device);
}

}  // namespace quietstar::cuda
