// thought_diagonal for fp32, and for rows that do not start at a multiple of 16 bytes: a warp per
// row (per key in the second pass of the backward), lanes along the head size, fp32 sums.
#pragma once

#include "reduce.cuh"
#include "thought_diagonal_rows.cuh"

namespace quietstar::cuda::diagonal_plain {

constexpr int kWarps = 4;
constexpr int kPieces = static_cast<int>(kMaxDiagonalSize) / 32;

// A row in the registers of a warp: lane + 32 i.
struct LaneRow {
  float at[kPieces];

  template <class T>
  __device__ __forceinline__ void load(const T* row, int size) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int d = static_cast<int>(threadIdx.x % 32) + 32 * i;
      at[i] = d < size ? to_float(row[d]) : 0;
    }
  }
  template <class T>
  __device__ __forceinline__ void store(T* row, int size) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int d = static_cast<int>(threadIdx.x % 32) + 32 * i;
      if (d < size) row[d] = from_float<T>(at[i]);
    }
  }
  // this = this * factor + other * weight
  __device__ __forceinline__ void blend(float factor, const LaneRow& other, float weight) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) at[i] = at[i] * factor + other.at[i] * weight;
  }
  __device__ __forceinline__ float dot(const LaneRow& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sum += at[i] * other.at[i];
    return warp_reduce(sum, Sum());
  }
};

// The warp's row number over all columns, or the key's; -1 past the last.
__device__ __forceinline__ bool take(unsigned per_column, unsigned count, unsigned& column,
                                     int& number) {
  const unsigned task = blockIdx.x * kWarps + threadIdx.x / 32;
  column = task / per_column;
  number = static_cast<int>(task % per_column);
  return task < count;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    diagonal_forward_plain(ThoughtDiagonal call, unsigned rows, unsigned tasks) {
  unsigned at = 0;
  int number = 0;
  if (!take(rows, tasks, at, number)) return;
  const DiagonalColumn c = diagonal_column(call, at);
  const DiagonalRow row = diagonal_row(call, c, number);
  const int size = static_cast<int>(call.head_size);
  const float scale = static_cast<float>(call.scale) * kLog2e;
  LaneRow q, sum{}, other;
  q.load(row_at<const T>(call.q, c.batch, row.head, row.slot, c.column), size);
  float top = -INFINITY, total = 0;
  for (int t = 0; t < row.seen; ++t) {
    other.load(row_at<const T>(call.k_thought, c.batch, c.head, t, c.column), size);
    const float x = q.dot(other) * scale;
    const float row_max = fmaxf(top, x);
    const float kept = top == -INFINITY ? 0 : exp2f(top - row_max);
    const float weight = row_max == -INFINITY ? 0 : exp2f(x - row_max);
    other.load(row_at<const T>(call.v_thought, c.batch, c.head, t, c.column), size);
    sum.blend(kept, other, weight);
    total = total * kept + weight;
    top = row_max;
  }
  const bool text = call.text_out.data != nullptr;
  const MergedRow merged = merge_row<T>(
      top, total,
      text ? *row_at<float>(call.text_lse, c.batch, row.head, row.slot, c.column) : -INFINITY,
      call.sinks ? call.sinks[row.head] : -INFINITY);
  if (merged.text != 0) {
    other.load(row_at<const T>(call.text_out, c.batch, row.head, row.slot, c.column), size);
    sum.blend(merged.slots, other, merged.text);
  } else {
    sum.blend(merged.slots, q, 0);
  }
  sum.store(row_at<T>(call.out, c.batch, row.head, row.slot, c.column), size);
  if (threadIdx.x % 32 == 0) {
    *row_at<float>(call.lse, c.batch, row.head, row.slot, c.column) = merged.lse;
  }
}

__device__ __forceinline__ float probability(float x, float lse) {
  return lse == -INFINITY ? 0 : exp2f((x - lse) * kLog2e);
}

// dq and delta.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    diagonal_dq_plain(ThoughtDiagonalBackward back, unsigned rows, unsigned tasks) {
  const ThoughtDiagonal& call = back.forward;
  unsigned at = 0;
  int number = 0;
  if (!take(rows, tasks, at, number)) return;
  const DiagonalColumn c = diagonal_column(call, at);
  const DiagonalRow row = diagonal_row(call, c, number);
  const int size = static_cast<int>(call.head_size);
  const auto scale = static_cast<float>(call.scale);
  LaneRow q, dout, dq{}, k, v;
  q.load(row_at<const T>(call.q, c.batch, row.head, row.slot, c.column), size);
  dout.load(row_at<const T>(back.dout, c.batch, row.head, row.slot, c.column), size);
  v.load(row_at<const T>(call.out, c.batch, row.head, row.slot, c.column), size);
  const float delta = dout.dot(v);
  const float lse = *row_at<float>(call.lse, c.batch, row.head, row.slot, c.column);
  if (back.text_dq.data) {
    dq.load(row_at<const T>(back.text_dq, c.batch, row.head, row.slot, c.column), size);
  }
  for (int t = 0; t < row.seen; ++t) {
    k.load(row_at<const T>(call.k_thought, c.batch, c.head, t, c.column), size);
    v.load(row_at<const T>(call.v_thought, c.batch, c.head, t, c.column), size);
    const float p = probability(q.dot(k) * scale, lse);
    dq.blend(1, k, p * (dout.dot(v) - delta) * scale);
  }
  dq.store(row_at<T>(back.dq, c.batch, row.head, row.slot, c.column), size);
  if (threadIdx.x % 32 == 0) {
    *row_at<float>(back.delta, c.batch, row.head, row.slot, c.column) = delta;
  }
}

// dk and dv, after diagonal_dq_plain.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    diagonal_dkv_plain(ThoughtDiagonalBackward back, int rows, unsigned tasks) {
  const ThoughtDiagonal& call = back.forward;
  unsigned at = 0;
  int t = 0;
  if (!take(static_cast<unsigned>(call.key_slots), tasks, at, t)) return;
  const DiagonalColumn c = diagonal_column(call, at);
  const int size = static_cast<int>(call.head_size);
  const auto scale = static_cast<float>(call.scale);
  LaneRow k, v, q, dout, dk{}, dv{};
  k.load(row_at<const T>(call.k_thought, c.batch, c.head, t, c.column), size);
  v.load(row_at<const T>(call.v_thought, c.batch, c.head, t, c.column), size);
  for (int number = 0; number < rows; ++number) {
    const DiagonalRow row = diagonal_row(call, c, number);
    if (t >= row.seen) continue;
    q.load(row_at<const T>(call.q, c.batch, row.head, row.slot, c.column), size);
    dout.load(row_at<const T>(back.dout, c.batch, row.head, row.slot, c.column), size);
    const float lse = *row_at<float>(call.lse, c.batch, row.head, row.slot, c.column);
    const float delta = *row_at<float>(back.delta, c.batch, row.head, row.slot, c.column);
    const float p = probability(q.dot(k) * scale, lse);
    dv.blend(1, dout, p);
    dk.blend(1, q, p * (dout.dot(v) - delta) * scale);
  }
  dk.store(row_at<T>(back.dk_thought, c.batch, c.head, t, c.column), size);
  dv.store(row_at<T>(back.dv_thought, c.batch, c.head, t, c.column), size);
}

}  // namespace quietstar::cuda::diagonal_plain
