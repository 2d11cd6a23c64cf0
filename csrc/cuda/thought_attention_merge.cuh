// Puts the results of a split forward pass together: with the lse of a row in each split,
//   lse = log2 sum_i 2^lse_i [+ 2^sink],   out = sum_i 2^(lse_i - lse) out_i.
// A warp per row. From memory: D + 1 floats per row and split.
#pragma once

#include "reduce.cuh"
#include "thought_attention_tiles.cuh"

namespace quietstar::cuda::attention {

constexpr int kMergeWarps = 4;

template <class T, int kSize>
__global__ void __launch_bounds__(kMergeWarps * 32, 8) merge_kernel(const Arguments a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t all = static_cast<std::int64_t>(a.pairs) * a.rows;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  if (index >= all) return;  // the whole warp; there are no barriers
  const Pair pair = pair_of(a, static_cast<int>(index / a.rows));
  const Row row = row_of(a, pair, static_cast<int>(index % a.rows));

  float top = a.sinks ? a.sinks[row.head] * kLog2E : -INFINITY;
  const float sink = top;
  for (int s = lane; s < a.splits; s += 32) top = fmaxf(top, a.split_lse[s * all + index]);
  top = warp_reduce(top, Largest{});
  if (top == -INFINITY) top = 0;
  float total = lane == 0 ? exp2_of<T>(sink - top) : 0;
  for (int s = lane; s < a.splits; s += 32) {
    total += exp2_of<T>(a.split_lse[s * all + index] - top);
  }
  total = warp_reduce(total, Sum{});
  const float factor = total == 0 ? 0 : 1 / total;
  if (lane == 0) {
    a.lse[flat(a, pair, row)] = total == 0 ? -INFINITY : (top + log2f(total)) * kLn2;
  }

  T* out = element<T>(a.out, pair, row);
  for (int d = lane * 2; d < a.size; d += 64) {
    float first = 0, second = 0;
    for (int s = 0; s < a.splits; ++s) {
      const std::int64_t at = s * all + index;
      const float weight = exp2_of<T>(a.split_lse[at] - top) * factor;
      const float2 two = *reinterpret_cast<const float2*>(a.split_out + at * kSize + d);
      first += weight * two.x;
      second += weight * two.y;
    }
    if (a.out_aligned) {
      put_two(out + d, first, second);  // a row is a multiple of 16 bytes
      continue;
    }
    out[d] = from_float<T>(first);
    if (d + 1 < a.size) out[d + 1] = from_float<T>(second);
  }
}

}  // namespace quietstar::cuda::attention
