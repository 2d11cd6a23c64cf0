// A row of logits as floats, block by block, for sample_tokens_kernel.cpp.
#pragma once

#include <cstdint>

#include "sample_tokens_rows.h"
#include "vec.h"

namespace quietstar::QUIETSTAR_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr float kLowest = -3.402823466e38f;  // below it there is only -inf
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kOctaves =
    100;  // elements that many octaves below their block's maximum count as 0
constexpr double kBinsPerOctave = 32;

template <class T>
T smaller(T a, T b) {
  return b < a ? b : a;
}

// The blocks of a row as floats.
template <class T>
struct Row {
  const T* data;
  std::int64_t vocab;
  const BannedIds& banned;
  float* buffer;
  float origin = 0;  // subtracted from every element

  // Elements of a block: a multiple of kLanes, the ones past the end of the row are -inf.
  std::int64_t padded(std::int64_t b) const {
    return (smaller(kBlock, vocab - b * kBlock) + kLanes - 1) / kLanes * kLanes;
  }

  const float* block(std::int64_t b) const {
    const T* from = data + b * kBlock;
    const std::int64_t count = smaller(kBlock, vocab - b * kBlock);
    const std::int64_t first = banned.first[b], last = banned.first[b + 1];
    const float* direct = as_floats(from);
    if (direct && count % kLanes == 0 && first == last && origin == 0) return direct;
    std::int64_t i = 0;
    const Vec minus = Vec::fill(origin);
    for (; i + kLanes <= count; i += kLanes) (Vec::load(from + i) - minus).store(buffer + i);
    for (; i < count; ++i) buffer[i] = to_float(from[i]) - origin;
    for (; i % kLanes; ++i) buffer[i] = -kInf;
    for (std::int64_t n = first; n < last; ++n) buffer[banned.ids[n] - b * kBlock] = -kInf;
    return buffer;
  }

 private:
  static const float* as_floats(const float* p) { return p; }
  template <class U>
  static const float* as_floats(const U*) {
    return nullptr;
  }
};

}  // namespace
}  // namespace quietstar::QUIETSTAR_ISA
