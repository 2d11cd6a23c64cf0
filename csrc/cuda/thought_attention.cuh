// What the kernels of thought_attention share: the rows of a call, what they see, and loading.
//
// A pair is one batch row and one key head. Its rows are all (column, slot, grouped head), numbered
// in this order, so that neighbours share their keys: 128 rows are about two columns of 15 slots
// and 4 heads. Its text keys are numbered by position. Its slot keys are numbered column by column,
// slot_stride for each, of which those past key_slots do not exist. So what a row sees is one range
// of text keys and one range of slot keys, and both are attended by the same code.
#pragma once

#include "launch.cuh"
#include "quietstar/thought_attention.h"
#include "thought_attention_shapes.cuh"

namespace quietstar::cuda::attention {

constexpr int kFar = 1 << 30;  // no key has this number
constexpr float kLog2E = 1.442695041f, kLn2 = 0.6931471806f;

// Division of 0 .. 2^31 - 1 by a number that is fixed beforehand.
struct Divider {
  unsigned divisor, magic;
  int shift;

  static Divider by(std::int64_t divisor) {
    int bits = 0;
    while ((std::int64_t{1} << bits) < divisor) ++bits;
    const std::uint64_t power = std::uint64_t{1} << (31 + bits);
    const auto d = static_cast<std::uint64_t>(divisor);
    return {static_cast<unsigned>(divisor), static_cast<unsigned>(power / d + 1), 31 + bits};
  }
  __device__ __forceinline__ unsigned divide(unsigned n) const {
    return static_cast<unsigned>(static_cast<std::uint64_t>(n) * magic >> shift);
  }
};

// How a product q.k becomes an exponent of 2: outer times f(product).
enum class Scores : int {
  plain,     // f(x) = x
  negative,  // f(x) = -x, for a negative scale; outer is never negative
  capped     // f(x) = tanh(inner x)
};

struct Arguments {
  AttentionTensor q, k_text, v_text, k_thought, v_thought, out;
  AttentionTensor dout, dq, dk_text, dv_text, dk_thought, dv_thought;  // backward
  float* lse;
  const std::int32_t *text_start, *text_stop;
  std::int64_t window;  // 0: none
  const float* sinks;
  const float* dlse;
  float* delta;
  int q_heads, kv_heads, groups, query_slots, key_slots, num_thoughts, text_length, size;
  int rows;         // of a pair
  int pairs;        // batch * kv_heads
  int slot_stride;  // slot keys per column, with those that do not exist
  int slot_keys;    // columns * slot_stride, or 0
  int slot_window;  // slots that a row sees at most: the window, or more than there are
  Divider by_rows, by_groups, by_slot_stride, by_pairs, by_kv_heads;
  Scores scores;
  float inner, outer, scale;
  bool precise;  // fp32 products keep all bits
  // Addresses and strides are multiples of 16 bytes, and so is a row.
  bool q_aligned, keys_aligned, out_aligned, dout_aligned, gradients_aligned;

  // forward with its keys split: out and lse of each split, [splits][pairs * rows] (x D), fp32
  int splits;
  float *split_out, *split_lse;

  // backward
  int parts;                   // sets of rows over which text gradients are summed apart
  float *dk_parts, *dv_parts;  // [parts][pairs][text_length][padded size], fp32
  int2* block_ranges;          // [B][row blocks] first and last text key that a block sees
  int* row_constants;          // [kRowConstants][pairs][rows], written by the row kernel
  int row_blocks;
};

// What the kernels of keys have to know of a row: the first and the last text key and slot key that
// it sees, and as floats its lse to the base of 2 and its delta.
constexpr int kRowConstants = 6;

// Instantiated in thought_attention_forward_*.cu and thought_attention_backward_*.cu: the kernels
// of head sizes up to kSize, or the small ones.
template <class T, int kSize, bool kSmall = false>
void launch_forward(const Arguments& a, const Device& device);
template <class T, int kSize, bool kSmall = false>
void launch_backward(const Arguments& a, const Device& device);

// A row: its column, its query slot and its query head.
struct Row {
  int column, slot, head;
};
struct Pair {
  int batch, kv_head;
};

__device__ __forceinline__ Pair pair_of(const Arguments& a, int pair) {
  return {pair / a.kv_heads, pair % a.kv_heads};
}

__device__ __forceinline__ Row row_of(const Arguments& a, const Pair& pair, int row) {
  const int column = static_cast<int>(a.by_rows.divide(static_cast<unsigned>(row)));
  const int rest = row - column * static_cast<int>(a.by_rows.divisor);
  const int slot = static_cast<int>(a.by_groups.divide(static_cast<unsigned>(rest)));
  return {column, slot, pair.kv_head * a.groups + rest - slot * a.groups};
}

// Numbers are not negative, which saves extending their signs.
template <class T>
__device__ __forceinline__ T* element(const AttentionTensor& t, int batch, int head, int slot,
                                      int column) {
  const auto times = [](int n, std::int64_t stride) { return static_cast<unsigned>(n) * stride; };
  return static_cast<T*>(t.data) + (times(batch, t.batch) + times(head, t.head)) +
         times(slot, t.slot) + times(column, t.column);
}
template <class T>
__device__ __forceinline__ T* element(const AttentionTensor& t, const Pair& pair, const Row& row) {
  return element<T>(t, pair.batch, row.head, row.slot, row.column);
}

// Where lse, dlse and delta have a row.
__device__ __forceinline__ std::int64_t flat(const Arguments& a, const Pair& pair, const Row& row) {
  return ((static_cast<std::int64_t>(pair.batch) * a.q_heads + row.head) * a.query_slots +
          row.slot) *
             a.num_thoughts +
         row.column;
}

// Keys first .. last - 1; where there are none, first = kFar and last = 0.
struct Range {
  int first, last;
};

__device__ __forceinline__ int depth_of(const Arguments& a, int slot) {
  return a.key_slots == 0 ? 0 : slot + 1 + a.key_slots - a.query_slots;
}

__device__ __forceinline__ Range text_range(const Arguments& a, int batch, const Row& row) {
  const std::int64_t at = static_cast<std::int64_t>(batch) * a.num_thoughts + row.column;
  const std::int64_t stop = a.text_stop[at];
  std::int64_t first = a.text_start[at];
  if (a.window > 0) {
    const std::int64_t near = stop + depth_of(a, row.slot) - a.window;
    first = first < near ? near : first;
  }
  first = first < 0 ? 0 : first;
  const std::int64_t last = stop < a.text_length ? stop : a.text_length;
  if (first >= last) return {kFar, 0};
  return {static_cast<int>(first), static_cast<int>(last)};
}

__device__ __forceinline__ Range slot_range(const Arguments& a, const Row& row) {
  const int depth = depth_of(a, row.slot);
  if (depth == 0) return {kFar, 0};
  const int begin = row.column * a.slot_stride, last = begin + depth;
  return {max(begin, last - a.slot_window), last};
}

// The slots of a row from the last of them alone: its column's up to that one, in the window.
__device__ __forceinline__ Range slots_until(const Arguments& a, int last) {
  const auto column = static_cast<int>(a.by_slot_stride.divide(static_cast<unsigned>(last - 1)));
  return {last == 0 ? kFar : max(column * a.slot_stride, last - a.slot_window), last};
}

// What rows see between them, and what every one of them sees.
struct Span {
  int low, high, all_first, all_last;

  __device__ __forceinline__ bool meets(int begin, int end) const {
    return low < end && high > begin;
  }
  __device__ __forceinline__ bool covers(int begin, int end) const {
    return all_first <= begin && all_last >= end;
  }
};
static_assert(sizeof(Span) == kSpanBytes);

// Of rows 0 .. count - 1, of which range_of(r) gives the range; by a whole warp.
template <class RangeOf>
__device__ __forceinline__ Span span_of_rows(int count, RangeOf range_of) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Span s{kFar, 0, 0, kFar};
  for (int r = lane; r < count; r += 32) {
    const Range range = range_of(r);
    s.low = min(s.low, range.first);
    s.high = max(s.high, range.last);
    s.all_first = max(s.all_first, range.first);
    s.all_last = min(s.all_last, range.last);
  }
  s.low = __reduce_min_sync(kAllLanes, s.low);
  s.high = __reduce_max_sync(kAllLanes, s.high);
  s.all_first = __reduce_max_sync(kAllLanes, s.all_first);
  s.all_last = __reduce_min_sync(kAllLanes, s.all_last);
  return s;
}

// What the rows of a block, or of a warp, see: in shared memory, a number per row each.
struct SeenBy {
  const int *text_first, *text_last, *slots_last;

  __device__ __forceinline__ Range range(const Arguments& a, bool slots, int row) const {
    // Without a branch, which would double the code around it.
    const int last = (slots ? slots_last : text_last)[row], first = text_first[row];
    return {slots ? slots_until(a, last).first : first, last};
  }
  __device__ __forceinline__ SeenBy from(int row) const {
    return {text_first + row, text_last + row, slots_last + row};
  }
};

// For the rows of a block: seen_by [kSeenBy][kRows] gets what SeenBy tells apart; spans
// [1 + warps][2] those of the block and of each warp, of the text and of the slots. They can be
// read afterwards. Returns what the block's rows see.
template <int kRows, int kWarpRows, int kThreads>
__device__ __forceinline__ SeenBy find_spans(const Arguments& a, const Pair& pair, int first_row,
                                             int* seen_by, Span* spans) {
  for (int r = static_cast<int>(threadIdx.x); r < kRows; r += kThreads) {
    // Rows past the end see what the last one sees: they change no decision.
    const Row row = row_of(a, pair, min(first_row + r, a.rows - 1));
    const Range text = text_range(a, pair.batch, row);
    seen_by[r] = text.first;
    seen_by[kRows + r] = text.last;
    seen_by[2 * kRows + r] = slot_range(a, row).last;
  }
  __syncthreads();
  static_assert(kThreads >= 64);
  const SeenBy seen{seen_by, seen_by + kRows, seen_by + 2 * kRows};
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (warp == i) {  // one warp for the block's: the others would find the same
      const Span all = span_of_rows(kRows, [&](int r) { return seen.range(a, i == 1, r); });
      if (threadIdx.x % 32 == 0) spans[i] = all;
    }
    Span own =
        span_of_rows(kWarpRows, [&](int r) { return seen.range(a, i == 1, warp * kWarpRows + r); });
    // A warp without rows, as in generation, has nothing to multiply.
    if (first_row + warp * kWarpRows >= a.rows) own = {kFar, 0, kFar, 0};
    if (threadIdx.x % 32 == 0) spans[2 + 2 * warp + i] = own;
  }
  __syncthreads();
  return seen;
}

// ---- scores
template <class T>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return tanhf(x);
  } else {
    // 1 - 2 / (1 + e^2x): off by some 2^-23 of 1, which is little beside the 16-bit inputs.
    const float exponent = x * (2 * kLog2E);
    return 1 - __fdividef(2.0f, 1 + fast_exp2(exponent > 125 ? 125 : exponent));  // a NaN stays
  }
}

template <class T>
__device__ __forceinline__ float score_of(const Arguments& a, float product) {
  if (a.scores == Scores::plain) return product;
  return a.scores == Scores::negative ? -product : tanh_of<T>(product * a.inner);
}

// exp2, as exact as the element type asks for.
template <class T>
__device__ __forceinline__ float exp2_of(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return exp2f(x);
  } else {
    return fast_exp2(x);
  }
}

}  // namespace quietstar::cuda::attention
