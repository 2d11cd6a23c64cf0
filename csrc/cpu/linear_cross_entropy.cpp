// Checks, blocks of tokens and threads of softmax_cross_entropy; the inner loops are in
// linear_cross_entropy_kernel.cpp.
//
// The tokens are cut into blocks that depend on their number alone, and the blocks' sums are added
// in their order, so that the results are the same for any number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "linear_cross_entropy_tile.h"
#include "parallel.h"
#include "quietstar/checks.h"

namespace quietstar {
namespace {

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kMaxBlocks = 64;       // they bound the workspace
constexpr std::int64_t kMinTokens = 256;      // in a block: below, a block's start costs too much
constexpr std::int64_t kPerThread = 1 << 14;  // elements that are worth a thread

std::int64_t round_up(std::int64_t n, std::int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

std::int64_t tokens_per_block(std::int64_t vocab) {
  return round_up(std::max((vocab + kMaxBlocks - 1) / kMaxBlocks, kMinTokens), 8);
}

class Run {
 public:
  explicit Run(const SoftmaxCrossEntropy& call)
      : call_(call),
        padded_(round_up(call.rows, kLanes)),
        per_block_(tokens_per_block(call.vocab)),
        blocks_((call.vocab + per_block_ - 1) / per_block_),
        threads_(std::min<std::int64_t>(call.threads, call.rows * call.vocab / kPerThread)),
        memory_(static_cast<float*>(call.workspace)) {
    check(call, std::numeric_limits<std::int64_t>::max(), call.rows);
    for (std::int64_t i = 0; i < call.banned_count; ++i) {
      const std::int64_t token = call.banned[i] - call.first_token;
      if (token >= 0 && token < call.vocab) banned_.push_back(token);
    }
    std::sort(banned_.begin(), banned_.end());
    banned_.erase(std::unique(banned_.begin(), banned_.end()), banned_.end());
  }

  void loss() const {
    float* const largest = memory_;
    float* const sums = memory_ + blocks_ * padded_;
    in_parallel(blocks_, threads_, [&](std::int64_t b, int) {
      QUIETSTAR_SIMD_CALL(softmax_block_sums, call_, block(b), largest + b * padded_,
                          sums + b * padded_);
    });
    for (std::int64_t r = 0; r < call_.rows; ++r) {
      float max = largest[r];
      for (std::int64_t b = 1; b < blocks_; ++b) max = std::max(max, largest[b * padded_ + r]);
      double total = 0;
      for (std::int64_t b = 0; b < blocks_; ++b) {
        const float below = largest[b * padded_ + r] - max;
        total += static_cast<double>(sums[b * padded_ + r]) * std::exp(below);
      }
      call_.largest[r] = max;
      call_.total[r] = static_cast<float>(total);
    }
    // The blocks' results are used up: the same memory takes the targets'.
    float* const y = memory_;
    QUIETSTAR_SIMD_CALL(softmax_targets, call_, y, memory_ + padded_);
    for (std::int64_t r = 0; r < call_.rows; ++r) {
      const double below = static_cast<double>(call_.largest[r]) - y[r];
      call_.nll[r] = has_target(r)
                         ? static_cast<float>(std::log(static_cast<double>(call_.total[r])) + below)
                         : INFINITY;
    }
  }

  void gradient() const {
    float* const largest = memory_;
    float* const factor = memory_ + padded_;
    float* const y = memory_ + 2 * padded_;
    float* const slope = memory_ + 3 * padded_;
    QUIETSTAR_SIMD_CALL(softmax_targets, call_, y, slope);
    std::vector<char> use(call_.rows);
    for (std::int64_t r = 0; r < padded_; ++r) {
      const bool inside = r < call_.rows;
      largest[r] = inside ? call_.largest[r] : 0;
      factor[r] = inside ? call_.row_weights[r] / call_.total[r] : 0;
    }
    for (std::int64_t r = 0; r < call_.rows; ++r) {
      use[r] = has_target(r);
      if (!use[r]) continue;
      const double total = call_.total[r];
      const double above = std::exp(static_cast<double>(y[r]) - largest[r]) - total;
      y[r] = static_cast<float>(call_.row_weights[r] * slope[r] * (above / total));
    }
    in_parallel(blocks_, threads_, [&](std::int64_t b, int) {
      QUIETSTAR_SIMD_CALL(softmax_block_gradient, call_, block(b), largest, factor);
    });
    QUIETSTAR_SIMD_CALL(softmax_put_targets, call_, y, use.data());
  }

 private:
  TokenBlock block(std::int64_t b) const {
    const std::int64_t begin = b * per_block_, end = std::min(begin + per_block_, call_.vocab);
    const auto first = std::lower_bound(banned_.begin(), banned_.end(), begin);
    const auto last = std::lower_bound(first, banned_.end(), end);
    return {begin, end, banned_.data() + (first - banned_.begin()), last - first};
  }

  // Whether row r has its target's element in the tile, and it is not banned.
  bool has_target(std::int64_t r) const {
    const std::int64_t token = call_.targets[r] - call_.first_token;
    return token >= 0 && token < call_.vocab &&
           !std::binary_search(banned_.begin(), banned_.end(), token);
  }

  const SoftmaxCrossEntropy& call_;
  std::int64_t padded_, per_block_, blocks_, threads_;
  float* memory_;
  std::vector<std::int64_t> banned_;
};

}  // namespace

std::int64_t softmax_cross_entropy_workspace(std::int64_t rows, std::int64_t vocab) {
  const std::int64_t per_block = tokens_per_block(vocab);
  const std::int64_t blocks = (vocab + per_block - 1) / per_block;
  return std::max<std::int64_t>(2 * blocks, 4) * round_up(rows, kLanes) *
         static_cast<std::int64_t>(sizeof(float));
}

void softmax_cross_entropy_loss(const SoftmaxCrossEntropy& call) {
  if (call.rows > 0) Run(call).loss();
}

void softmax_cross_entropy_gradient(const SoftmaxCrossEntropy& call) {
  if (call.rows > 0) Run(call).gradient();
}

}  // namespace quietstar
