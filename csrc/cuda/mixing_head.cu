// Launches of the mixing head's kernels (mixing_head*.cuh): which width of access, how many threads
// a row, and how the sums over rows are cut.
#include <algorithm>
#include <string>
#include <type_traits>

#include "launch.cuh"
#include "mixing_head_backward.cuh"
#include "quietstar/checks.h"

namespace quietstar::cuda {
namespace {

// Blocks of the tail's backward pass: about three on each multiprocessor of a large device. It is a
// constant, so that sums do not depend on the device's number of multiprocessors.
constexpr std::int64_t kMaxBlocks = 384;
constexpr std::int64_t kMinRows = 8;          // of such a block
constexpr std::int64_t kMaxShares = 1024;     // of positions, for rows of one block's width
constexpr std::int64_t kMaxWidth = 20480;     // where a block may have 163 KiB of shared memory
constexpr std::int64_t kStaticShared = 128;   // bytes of it that are not the column sums'
constexpr std::int64_t kWarpPieces = 4 * 32;  // rows of at most that many pieces get a warp

void check_on(const MixingHead& call, const Device& device) {
  check(call);
  const std::int64_t max = max_mixing_width(device);
  QUIETSTAR_ARGUMENT(call.width <= max, "width is " + std::to_string(call.width) +
                                            "; expected 1 to " + std::to_string(max) +
                                            " on this device");
  QUIETSTAR_ARGUMENT(call.rows < std::int64_t{1} << 31, "thought has " + std::to_string(call.rows) +
                                                            " rows; expected fewer than 2^31");
}

// Whether all rows of all operands start at multiples of 16 bytes.
template <class... Pointers>
bool all_wide(const MixingHead& call, const Pointers*... pointers) {
  const auto bits = (reinterpret_cast<std::uintptr_t>(pointers) | ...);
  return (bits | static_cast<std::uintptr_t>(call.width * bytes_of(call.dtype))) % 16 == 0;
}

// Calls function(T{}, std::bool_constant<wide>{}).
template <class Function>
void with_types(DType dtype, bool wide, Function function) {
  with_type(dtype, [&](auto type) {
    return wide ? function(type, std::true_type{}) : function(type, std::false_type{});
  });
}

// The block of kElementThreads threads with x of them on a row of so many pieces.
dim3 element_block(std::int64_t pieces) {
  unsigned x = 8;
  while (x < pieces && x < kElementThreads) x *= 2;
  return dim3(x, kElementThreads / x);
}

// Shares of the positions in the first layer's backward pass.
std::int64_t shares_of(DType dtype, std::int64_t positions, std::int64_t width) {
  const std::int64_t across = ceil_div(width * bytes_of(dtype), 16 * kElementThreads);
  return std::min(positions, std::max<std::int64_t>(1, kMaxShares / across));
}

std::int64_t rows_per_block(std::int64_t rows) {
  return std::max(kMinRows, ceil_div(rows, kMaxBlocks));
}

template <class T>
void sum_parts(const MixingHead& call, const Device& device, std::int64_t parts,
               std::int64_t columns, int piece, void* out, void* second) {
  launch("mixing_sum", device, mixing_sum_kernel<T>, blocks(columns, 32), dim3(32 * kSumWarps), 0,
         call.workspace, parts, columns, call.width, piece, static_cast<T*>(out),
         static_cast<T*>(second));
}

}  // namespace

std::int64_t max_mixing_width(const Device& device) {
  const auto bytes = static_cast<std::int64_t>(max_shared_memory(device)) - kStaticShared;
  return std::min(kMaxWidth, bytes / static_cast<std::int64_t>(2 * sizeof(float)));
}

std::int64_t mixing_workspace(DType dtype, std::int64_t rows, std::int64_t positions,
                              std::int64_t width) {
  const std::int64_t parts = ceil_div(rows, rows_per_block(rows));
  return width * std::max(2 * parts, shares_of(dtype, positions, width));
}

void mixing_first(const MixingHead& call, const Device& device) {
  check_on(call, device);
  const bool wide = all_wide(call, call.product, call.from_base, call.b1, call.h1);
  with_types(call.dtype, wide, [&](auto t, auto is_wide) {
    using T = decltype(t);
    using P = Piece<T, is_wide>;
    const dim3 block = element_block(call.width / P::size);
    launch("mixing_first", device, mixing_first_kernel<T, is_wide>, blocks(call.rows, block.y),
           block, 0, call);
  });
}

void mixing_tail(const MixingHead& call, const Device& device) {
  check_on(call, device);
  const bool wide = all_wide(call, call.h2, call.w3, call.base, call.thought, call.mixed);
  with_types(call.dtype, wide, [&](auto t, auto is_wide) {
    using T = decltype(t);
    if constexpr (is_wide) {
      if (call.width / Pack<T>::size <= kWarpPieces) {
        return launch("mixing_tail", device, mixing_tail_kernel<T, true, 32>,
                      blocks(call.rows, kTailThreads / 32), dim3(kTailThreads), 0, call);
      }
    }
    launch("mixing_tail", device, mixing_tail_kernel<T, is_wide, kTailThreads>, dim3(call.rows),
           dim3(kTailThreads), 0, call);
  });
}

void mixing_tail_backward(const MixingHead& call, const Device& device) {
  check_on(call, device);
  const bool wide = all_wide(call, call.grad_mixed, call.base, call.thought, call.h2, call.w3,
                             call.grad_thought, call.grad_h2);
  const std::int64_t share = rows_per_block(call.rows), parts = ceil_div(call.rows, share);
  with_types(call.dtype, wide, [&](auto t, auto is_wide) {
    using T = decltype(t);
    auto kernel = mixing_tail_backward_kernel<T, is_wide, kBackwardThreads>;
    std::int64_t groups = 1;
    if constexpr (is_wide) {
      if (call.width / Pack<T>::size <= kWarpPieces) {
        kernel = mixing_tail_backward_kernel<T, true, 32>;
        groups = kBackwardThreads / 32;
      }
    }
    launch("mixing_tail_backward", device, kernel, blocks(parts), dim3(kBackwardThreads),
           sizeof(float) * groups * 2 * call.width, call, share);
    sum_parts<T>(call, device, parts, 2 * call.width, Piece<T, is_wide>::size, call.grad_b2,
                 call.grad_w3);
  });
}

void mixing_first_backward(const MixingHead& call, const Device& device) {
  check_on(call, device);
  const bool wide = all_wide(call, call.grad_h1, call.h1, call.grad_mixed, call.grad_from_base,
                             call.grad_base, call.workspace);
  const std::int64_t max_shares = shares_of(call.dtype, call.positions, call.width);
  const std::int64_t share = ceil_div(call.positions, std::max<std::int64_t>(1, max_shares));
  const std::int64_t shares = ceil_div(call.positions, std::max<std::int64_t>(1, share));
  with_types(call.dtype, wide, [&](auto t, auto is_wide) {
    using T = decltype(t);
    using P = Piece<T, is_wide>;
    const dim3 block = element_block(call.width / P::size);
    const std::int64_t columns = std::int64_t{block.x} * P::size;
    launch("mixing_first_backward", device, mixing_first_backward_kernel<T, is_wide>,
           dim3(ceil_div(call.width, columns), ceil_div(shares, block.y)), block, 0, call, share);
    sum_parts<T>(call, device, shares, call.width, 1, call.grad_b1, nullptr);
  });
}

}  // namespace quietstar::cuda
