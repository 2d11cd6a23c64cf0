// Addresses and rows that both kinds of kernels of thought_diagonal.cu share.
#pragma once

#include "arch.cuh"
#include "quietstar/thought_diagonal.h"

namespace quietstar::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The first element of row (b, h, s, m).
template <class T>
__device__ __forceinline__ T* row_at(const AttentionTensor& t, int b, int h, int s, int m) {
  return static_cast<T*>(t.data) + (b * t.batch + h * t.head + s * t.slot + m * t.column);
}

// A column under one key head.
struct DiagonalColumn {
  int batch, head, column;
};
// Numbered with heads next to each other: in memory they usually are.
__device__ __forceinline__ DiagonalColumn diagonal_column(const ThoughtDiagonal& call,
                                                          unsigned number) {
  const auto heads = static_cast<unsigned>(call.kv_heads);
  const auto columns = static_cast<unsigned>(call.num_thoughts);
  const unsigned pair = number / heads;
  return {static_cast<int>(pair / columns), static_cast<int>(number % heads),
          static_cast<int>(pair % columns)};
}

// Rows of a column: query slot by query slot, and in a slot the heads that share the key head.
struct DiagonalRow {
  bool there;
  int head, slot;
  int seen;  // thought slots that it looks at; 0 for a row that is not there
};
__device__ __forceinline__ DiagonalRow diagonal_row(const ThoughtDiagonal& call,
                                                    const DiagonalColumn& column, int number) {
  const int groups = static_cast<int>(call.q_heads / call.kv_heads);
  const bool there = number < groups * static_cast<int>(call.query_slots);
  const int slot = there ? number / groups : 0;
  const int keys = static_cast<int>(call.key_slots);
  const int seen = min(slot + 1 + keys - static_cast<int>(call.query_slots), keys);
  return {there, column.head * groups + (there ? number % groups : 0), slot, there ? seen : 0};
}

// What the two parts of a row and its sink weigh, and the logarithm of their sum.
struct MergedRow {
  float slots;  // factor on the slot part, which is relative to exp2(top)
  float text;   // factor on the text part
  float lse;    // natural log
};
// top, total: the slot part's largest x and its sum exp2(x - top), x in units of log2; -inf and 0
// for a row without slots. lse_text: natural log. As exact as the element type asks for.
template <class T>
__device__ __forceinline__ MergedRow merge_row(float top, float total, float text_lse, float sink) {
  const float text = text_lse * kLog2e, extra = sink * kLog2e;
  const float row_max = fmaxf(fmaxf(top, text), extra);
  if (row_max == -INFINITY) return {0, 0, -INFINITY};
  const auto power = [](float x) { return sizeof(T) == 2 ? fast_exp2(x) : exp2f(x); };
  const float slots = power(top - row_max), of_text = power(text - row_max);
  const float sum = total * slots + of_text + power(extra - row_max);
  const float factor = sizeof(T) == 2 ? __fdividef(1.0f, sum) : 1 / sum;
  return {slots * factor, of_text * factor, (row_max + log2f(sum)) * kLn2};
}

}  // namespace quietstar::cuda
