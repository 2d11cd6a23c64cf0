// The backward pass of thought_attention: its launches in order, and the two small kernels around
// the large ones.
#pragma once

#include "thought_attention_key_gradients.cuh"
#include "thought_attention_row_gradients.cuh"
#include "thought_attention_slot_gradients.cuh"

namespace quietstar::cuda::attention {

constexpr int kSmallThreads = 128;

// to [B][row_blocks]: the first and last text key that a block of block_rows rows sees. A warp per
// block.
template <int kBlockRows>
__global__ void __launch_bounds__(kSmallThreads)
    block_ranges_kernel(const Arguments a, int2* to, int batch) {
  const int index =
      static_cast<int>(blockIdx.x) * (kSmallThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (index >= batch * a.row_blocks) return;  // the whole warp; there are no barriers
  const Pair pair{index / a.row_blocks, 0};
  const int first_row = index % a.row_blocks * kBlockRows;
  Range all{kFar, 0};
  for (int r = static_cast<int>(threadIdx.x) % 32; r < kBlockRows; r += 32) {
    if (first_row + r >= a.rows) continue;
    const Range seen = text_range(a, pair.batch, row_of(a, pair, first_row + r));
    all = {min(all.first, seen.first), max(all.last, seen.last)};
  }
  all.first = __reduce_min_sync(kAllLanes, all.first);
  all.last = __reduce_max_sync(kAllLanes, all.last);
  if (threadIdx.x % 32 == 0) to[index] = make_int2(all.first, all.last);
}

// dk_text and dv_text from their parts. A thread per 16 bytes of either.
template <class T, int kSize>
__global__ void __launch_bounds__(kSmallThreads) reduce_parts_kernel(const Arguments a) {
  constexpr int kPack = Pack<T>::size, kChunks = kSize / kPack;
  const std::int64_t keys = static_cast<std::int64_t>(a.pairs) * a.text_length;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kSmallThreads + threadIdx.x;
  const std::int64_t key = index / kChunks;
  const int d = static_cast<int>(index % kChunks) * kPack;
  if (key >= keys || d >= a.size) return;
  const Pair pair = pair_of(a, static_cast<int>(key / a.text_length));
  const int place = static_cast<int>(key % a.text_length);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* from = (i == 0 ? a.dk_parts : a.dv_parts) + key * kSize + d;
    float sum[kPack] = {};
    for (int part = 0; part < a.parts; ++part) {
#pragma unroll
      for (int e = 0; e < kPack; e += 4) {
        const Pack<float> four = load16(from + part * keys * kSize + e);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[e + n] += four.at[n];
      }
    }
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e) pack.at[e] = from_float<T>(sum[e] * (i == 0 ? a.scale : 1.0f));
    store_chunk(element<T>(i == 0 ? a.dk_text : a.dv_text, pair.batch, pair.kv_head, place, 0),
                pack, d, a.size, a.gradients_aligned);
  }
}

template <class T, int kSize, bool kSmall>
void launch_backward(const Arguments& a, const Device& device) {
  constexpr int kBlockRows = key_gradient_shape(sizeof(T), kSize, kSmall).rows;
  const int batch = a.pairs / a.kv_heads;
  launch("thought_attention_block_ranges", device, block_ranges_kernel<kBlockRows>,
         blocks(static_cast<std::int64_t>(batch) * a.row_blocks, kSmallThreads / 32),
         dim3(kSmallThreads), 0, a, a.block_ranges, batch);
  launch_row_gradients<T, kSize, kSmall>(a, device);
  launch_slot_gradients<T, kSize>(a, device);
  if constexpr (kSize <= 128) {
    launch_key_gradients<T, kSize, Pass::both, kSmall>(a, device);
  } else {
    launch_key_gradients<T, kSize, Pass::values, kSmall>(a, device);
    launch_key_gradients<T, kSize, Pass::keys, kSmall>(a, device);
  }
  if (a.parts == 1) return;
  launch("thought_attention_reduce_parts", device, reduce_parts_kernel<T, kSize>,
         blocks(static_cast<std::int64_t>(a.pairs) * a.text_length * kSize / Pack<T>::size,
                kSmallThreads),
         dim3(kSmallThreads), 0, a);
}

}  // namespace quietstar::cuda::attention
