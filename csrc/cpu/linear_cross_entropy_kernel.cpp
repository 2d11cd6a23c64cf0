// Inner loops of softmax_cross_entropy; what is computed stands in
// quietstar/linear_cross_entropy.h.
//
// A block of words is walked in groups of eight words, sixteen rows at a time. The eight vectors
// stay in registers between their maximum and their exponentials, and the running maximum and sum
// of a row are rescaled once a group (Milakov and Gimelshein 2018, arXiv 1805.02867): nine
// exponentials for eight elements. The second pass, over logits that the first has left in the
// cache where the chunk fits, computes the exponential again and writes.
//   memory: two reads and one write an element; operations: about 35 vector instructions for 16
//   elements in both passes together (90 with a softcap). Between matrix products of width 256 the
//   kernel takes one to two per cent of the time.
// Tried, without a gain: writing the exponentials in the first pass to scale them in the second
// (one exponential less, one write more); sixteen words a group.
#include <cstdint>

#include "linear_cross_entropy_tile.h"
#include "vec_store.h"

namespace quietstar::QUIETSTAR_ISA {
namespace {

constexpr float kLowest = -3.402823466e38f;
constexpr float kSmallestExponent = -87.0f;  // exp below it is not a normal number and counts as 0
constexpr int kGroup = 8;
constexpr double kLog2E = 1.4426950408889634;

// exp(x) for x <= 0 (a little above is fine); NaN stays NaN.
struct Exponential {
  TwoFloats log2e{kLog2E};
  Vec zero = Vec::fill(0.0f), floor = Vec::fill(kSmallestExponent);
  Vec operator()(Vec x) const {
    // The lower bound keeps the power in range; what it moved is taken out again. A NaN passes max
    // as the second operand.
    return zero_where_below(exp2_of_product(max(floor, x), log2e, zero), x, floor);
  }
};

// y and dy/dx of raw products x.
template <bool capped>
struct Logit {
  Vec scale;
  explicit Logit(const SoftmaxCrossEntropy& call)
      : scale(Vec::fill(static_cast<float>(call.logit_scale / call.temperature))) {}
  Vec operator()(Vec x) const { return x * scale; }
  Vec slope(Vec x, Vec* y) const {
    *y = x * scale;
    return scale;
  }
};

template <>
struct Logit<true> {
  Vec inner, outer, scale;
  Exponential exponential;
  Vec one = Vec::fill(1.0f), zero = Vec::fill(0.0f), small = Vec::fill(0.4f);
  explicit Logit(const SoftmaxCrossEntropy& call)
      : inner(Vec::fill(static_cast<float>(call.logit_scale / call.softcap))),
        outer(Vec::fill(static_cast<float>(call.softcap / call.temperature))),
        scale(Vec::fill(static_cast<float>(call.logit_scale / call.temperature))) {}

  // tanh(u) = u (1 + P(u^2)) near 0, where (1 - e) / (1 + e), e = exp(-2 |u|), would cancel.
  Vec tanh(Vec u, Vec* e) const {
    const Vec minus = zero - u;
    const Vec size = max(u, minus);
    *e = exponential(Vec::fill(-2.0f) * size);
    // Taylor's series to u^13, with a relative error of 4e-9 at 0.4. Clamped, as u^13 of another
    // lane may overflow.
    const Vec v = max(zero - small, zero - max(minus, zero - small));
    const Vec square = v * v;
    Vec p = Vec::fill(21844.0f / 6081075.0f);
    p = fma(p, square, Vec::fill(-1382.0f / 155925.0f));
    p = fma(p, square, Vec::fill(62.0f / 2835.0f));
    p = fma(p, square, Vec::fill(-17.0f / 315.0f));
    p = fma(p, square, Vec::fill(2.0f / 15.0f));
    p = fma(p, square, Vec::fill(-1.0f / 3.0f));
    const Vec near = fma(p * square, v, v);
    const Vec far = (one - *e) / (one + *e);
    // Signs: far counts where u >= small, -far where -u >= small, near where neither.
    const Vec apart = zero_where_below(far, u, small) - zero_where_below(far, minus, small);
    return apart + (near - zero_where_below(near, size, small));
  }
  Vec operator()(Vec x) const {
    Vec e;
    return tanh(x * inner, &e) * outer;
  }
  Vec slope(Vec x, Vec* y) const {
    Vec e;
    *y = tanh(x * inner, &e) * outer;
    const Vec sum = one + e;
    return scale * (Vec::fill(4.0f) * e / (sum * sum));  // 1 - tanh^2
  }
};

// Runs of words between banned ones: calls visit(begin, end) for each run, skip(word) for each
// banned word.
template <class Visit, class Skip>
void for_runs(const WordBlock& block, Visit visit, Skip skip) {
  std::int64_t word = block.begin;
  for (std::int64_t i = 0; i < block.banned_count; ++i) {
    const std::int64_t banned = block.banned[i];
    if (word < banned) visit(word, banned);
    skip(banned);
    word = banned + 1;
  }
  if (word < block.end) visit(word, block.end);
}

template <class T, bool capped>
class Tile {
 public:
  explicit Tile(const SoftmaxCrossEntropy& call)
      : data_(static_cast<T*>(call.logits)),
        rows_(call.rows),
        stride_(call.word_stride),
        logit_(call) {}

  void sums(const WordBlock& block, float* largest, float* sums) const {
    for (std::int64_t r = 0; r < rows_; r += kLanes) {
      Vec::fill(kLowest).store(largest + r);
      Vec::fill(0.0f).store(sums + r);
    }
    for_runs(
        block,
        [&](std::int64_t word, std::int64_t end) {
          for (; word + kGroup <= end; word += kGroup) add<kGroup>(word, largest, sums);
          for (; word < end; ++word) add<1>(word, largest, sums);
        },
        [](std::int64_t) {});
  }

  void gradient(const WordBlock& block, const float* largest, const float* factor) const {
    for_runs(
        block,
        [&](std::int64_t word, std::int64_t end) {
          for (; word < end; ++word) {
            T* row = data_ + word * stride_;
            std::int64_t r = 0;
            for (; r + kLanes <= rows_; r += kLanes) {
              store(row + r, slope_at(Vec::load(row + r), largest + r, factor + r));
            }
            if (r < rows_) {
              const Vec x = load_part(row + r, rows_ - r);
              store_part(row + r, slope_at(x, largest + r, factor + r), rows_ - r);
            }
          }
        },
        [&](std::int64_t word) {
          std::memset(data_ + word * stride_, 0, sizeof(T) * static_cast<std::size_t>(rows_));
        });
  }

  // y and dy/dx at the targets, of anything for a target outside the tile.
  void targets(const SoftmaxCrossEntropy& call, float* y, float* slope) const {
    for (std::int64_t r = 0; r < rows_; r += kLanes) {
      float x[kLanes] = {};
      for (std::int64_t i = r; i < rows_ && i < r + kLanes; ++i) {
        const std::int64_t word = call.targets[i] - call.first_word;
        if (word >= 0 && word < call.words) x[i - r] = to_float(data_[word * stride_ + i]);
      }
      Vec values;
      logit_.slope(Vec::load(x), &values).store(slope + r);
      values.store(y + r);
    }
  }

  // Overwrites the targets' elements where use[r] is set.
  void put_targets(const SoftmaxCrossEntropy& call, const float* values, const char* use) const {
    for (std::int64_t r = 0; r < rows_; ++r) {
      if (use[r]) put(data_ + (call.targets[r] - call.first_word) * stride_ + r, values[r]);
    }
  }

 private:
  template <int count>
  void add(std::int64_t word, float* largest, float* sums) const {
    const T* from = data_ + word * stride_;
    std::int64_t r = 0;
    for (; r + kLanes <= rows_; r += kLanes) {
      Vec y[count];
      for (int i = 0; i < count; ++i) y[i] = logit_(Vec::load(from + i * stride_ + r));
      update<count>(y, largest + r, sums + r);
    }
    if (r < rows_) {
      Vec y[count];
      for (int i = 0; i < count; ++i) y[i] = logit_(load_part(from + i * stride_ + r, rows_ - r));
      update<count>(y, largest + r, sums + r);
    }
  }

  template <int count>
  void update(const Vec* y, float* largest, float* sums) const {
    const Vec before = Vec::load(largest);
    Vec most = before;
    for (int i = 0; i < count; ++i) most = max(y[i], most);
    Vec sum = exponential_(y[0] - most);
    for (int i = 1; i < count; ++i) sum = sum + exponential_(y[i] - most);
    sum = fma(Vec::load(sums), exponential_(before - most), sum);
    most.store(largest);
    sum.store(sums);
  }

  Vec slope_at(Vec x, const float* largest, const float* factor) const {
    Vec y;
    const Vec slope = logit_.slope(x, &y);
    return exponential_(y - Vec::load(largest)) * (Vec::load(factor) * slope);
  }

  T* data_;
  std::int64_t rows_, stride_;
  Logit<capped> logit_;
  Exponential exponential_;
};

// Calls function with the tile of the call's type.
template <class Function>
void with_tile(const SoftmaxCrossEntropy& call, Function function) {
  const bool capped = call.softcap != 0;
  switch (call.dtype) {
    case DType::bf16:
      return capped ? function(Tile<BFloat16, true>(call)) : function(Tile<BFloat16, false>(call));
    case DType::f16:
      return capped ? function(Tile<Float16, true>(call)) : function(Tile<Float16, false>(call));
    default:
      return capped ? function(Tile<float, true>(call)) : function(Tile<float, false>(call));
  }
}

}  // namespace

void softmax_block_sums(const SoftmaxCrossEntropy& call, const WordBlock& block, float* largest,
                        float* sums) {
  with_tile(call, [&](const auto& tile) { tile.sums(block, largest, sums); });
}

void softmax_block_gradient(const SoftmaxCrossEntropy& call, const WordBlock& block,
                            const float* largest, const float* factor) {
  with_tile(call, [&](const auto& tile) { tile.gradient(block, largest, factor); });
}

void softmax_targets(const SoftmaxCrossEntropy& call, float* y, float* slope) {
  with_tile(call, [&](const auto& tile) { tile.targets(call, y, slope); });
}

void softmax_put_targets(const SoftmaxCrossEntropy& call, const float* values, const char* use) {
  with_tile(call, [&](const auto& tile) { tile.put_targets(call, values, use); });
}

}  // namespace quietstar::QUIETSTAR_ISA
