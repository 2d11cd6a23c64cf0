// Checks, blocks of rows and threads of the mixing head; the inner loops are in
// mixing_head_kernel.cpp. Work is cut by sizes alone and summed in order, so that the results are
// the same for any number of threads.
#include <algorithm>
#include <string>
#include <vector>

#include "mixing_head_rows.h"
#include "parallel.h"
#include "quietstar/checks.h"

namespace quietstar {
namespace {

constexpr std::int64_t kMaxBlocks = 64;  // that sum the gradients of b1, b2 and w3 on their own
constexpr std::int64_t kMinRows = 16;    // in such a block
constexpr std::int64_t kPortion = 16 * 1024;  // elements that are worth a portion of work

// Calls body(begin, end) for portions of [0, count), size rows each, on several threads.
template <class Body>
void in_portions(std::int64_t count, std::int64_t size, int threads, Body body) {
  const std::int64_t portions = count == 0 ? 0 : (count + size - 1) / size;
  in_parallel(portions, threads,
              [&](std::int64_t p, int) { body(p * size, std::min((p + 1) * size, count)); });
}

// Work that does not sum over rows.
template <class Body>
void over_rows(const MixingHead& call, Body body) {
  check(call);
  in_portions(call.rows, std::max<std::int64_t>(1, kPortion / call.width), call.threads, body);
}

}  // namespace

void mixing_first(const MixingHead& call) {
  over_rows(call, [&](std::int64_t begin, std::int64_t end) {
    QUIETSTAR_SIMD_CALL(mixing_first_rows, call, begin, end);
  });
}

void mixing_tail(const MixingHead& call) {
  over_rows(call, [&](std::int64_t begin, std::int64_t end) {
    QUIETSTAR_SIMD_CALL(mixing_tail_rows, call, begin, end);
  });
}

void mixing_tail_backward(const MixingHead& call) {
  check(call);
  const std::int64_t size = std::max(kMinRows, (call.rows + kMaxBlocks - 1) / kMaxBlocks);
  const std::int64_t blocks = (call.rows + size - 1) / size, width = call.width;
  std::vector<float> sums(static_cast<std::size_t>(2 * width * blocks));
  in_portions(call.rows, size, call.threads, [&](std::int64_t begin, std::int64_t end) {
    float* const mine = sums.data() + begin / size * 2 * width;
    QUIETSTAR_SIMD_CALL(mixing_tail_rows_backward, call, begin, end, mine, mine + width);
  });
  for (std::int64_t i = 0; i < width; ++i) {
    double b2 = 0, w3 = 0;
    for (std::int64_t b = 0; b < blocks; ++b) {
      b2 += sums[b * 2 * width + i];
      w3 += sums[(b * 2 + 1) * width + i];
    }
    static_cast<float*>(call.grad_b2)[i] = static_cast<float>(b2);
    static_cast<float*>(call.grad_w3)[i] = static_cast<float>(w3);
  }
}

void mixing_first_backward(const MixingHead& call) {
  check(call);
  // The rows of each position, in their order: a counting sort.
  std::vector<std::int64_t> first(call.positions + 1), order(call.rows);
  const auto position = [&](std::int64_t r) { return call.index ? call.index[r] : r; };
  for (std::int64_t r = 0; r < call.rows; ++r) {
    const std::int64_t p = position(r);
    if (p < 0 || p >= call.positions) {
      QUIETSTAR_ARGUMENT(false, "base_index contains " + std::to_string(p) +
                                    "; expected values from 0 to " +
                                    std::to_string(call.positions - 1));
    }
    ++first[p + 1];
  }
  for (std::int64_t p = 0; p < call.positions; ++p) first[p + 1] += first[p];
  std::vector<std::int64_t> next(first.begin(), first.end() - 1);
  for (std::int64_t r = 0; r < call.rows; ++r) order[next[position(r)]++] = r;

  const std::int64_t size = (call.positions + kMaxBlocks - 1) / kMaxBlocks, width = call.width;
  const std::int64_t blocks = size > 0 ? (call.positions + size - 1) / size : 0;
  std::vector<float> sums(static_cast<std::size_t>(3 * width * blocks));
  in_portions(call.positions, size, call.threads, [&](std::int64_t begin, std::int64_t end) {
    QUIETSTAR_SIMD_CALL(mixing_positions_backward, call, first.data(), order.data(), begin, end,
                        sums.data() + begin / size * 3 * width);
  });
  for (std::int64_t i = 0; i < width; ++i) {
    double b1 = 0;
    for (std::int64_t b = 0; b < blocks; ++b) b1 += sums[b * 3 * width + i];
    static_cast<float*>(call.grad_b1)[i] = static_cast<float>(b1);
  }
}

}  // namespace quietstar
