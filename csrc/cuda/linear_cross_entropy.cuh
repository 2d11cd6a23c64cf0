// Kernels of softmax_cross_entropy on a device, but for 16-bit logits without a soft-cap
// (linear_cross_entropy_plain.cuh).
//
// What: nll and gradient of rows of logits, as quietstar/linear_cross_entropy.h defines them.
// Tiling: a row per block, a block goes from row to row. Its threads take 16 bytes at a time, four
//   such loads under way each, and keep a running maximum and sum of exponentials (Milakov and
//   Gimelshein 2018, arXiv 1805.02867), rescaled once per four loads. What a thread has read stays
//   in shared memory, as far as that reaches, in places that only this thread uses: the second
//   pass, which writes the gradient, reads it from there, and the rest of the row again, from L2.
//   So the only barrier of a row is the one that joins the threads' sums.
// Bytes: the loss reads an element once. The gradient reads and writes it once; of a row that is
//   longer than shared memory (227 KB on sm_90) it reads the rest twice.
// Operations: some 10 instructions an element in either pass, one of them exp2; with a softcap
// about
//   40 in both, 6 of them by the special-function unit, which then bounds the rate rather than
//   memory.
#pragma once

#include <cstdint>

#include "linear_cross_entropy_row.cuh"

namespace quietstar::cuda {

// nll[row], and with `gradient` the row's gradient: a block of 32 .. 1024 threads per row, with
// `kept` packs of dynamic shared memory. scale is logit_scale / temperature.
template <class T, class Logit, bool gradient>
__global__ void __launch_bounds__(kMaxRowThreads)
    softmax_cross_entropy_rows(T* logits, std::int64_t rows, int vocab, std::int64_t row_stride,
                               const std::int64_t* targets, const unsigned char* valid_rows,
                               const std::uint32_t* banned, Logit logit, float scale, float* nll,
                               const float* row_weights, int kept) {
  QUIETSTAR_DYNAMIC_SHARED(memory);
  QUIETSTAR_SHARED(Partial, scratch, [2][32]);
  using Row = RowOfLogits<T, Logit>;
  constexpr int kSize = Row::kSize, kLoads = Logit::kLoads;
  // Loads under way in the second pass, from L2; 16-bit types would not have the registers for two.
  constexpr int kAgain = sizeof(T) == 4 ? 2 : 1;
  auto* const keep = reinterpret_cast<Pack<T>*>(memory);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  int turn = 0;  // the scratch of the row before may still be read
  for (std::int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const PlacedRow<T> at(logits + r * row_stride, vocab);
    if (valid_rows != nullptr && valid_rows[r] == 0) {
      if (thread == 0) nll[r] = 0;
      if (gradient) at.clear();
      continue;
    }
    const int packs = at.packs, head = at.head;
    const Row row(targets[r], vocab, banned, logit);
    const float x = row.target_logit(at.data);  // read by all before anybody writes

    Partial mine{kLowest, 0};
    for (int i = thread; i < packs; i += kLoads * threads) {
      Pack<T> group[kLoads];
      unsigned out = 0;
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pack = i + u * threads;
        group[u] = Pack<T>{};
        if (pack < packs) {
          const T* const from = at.body + pack * kSize;
          group[u] = gradient && pack >= kept ? load16(from) : load16_once(from);
        }
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pack = i + u * threads;
        if (pack < packs) {
          if (gradient && pack < kept) keep[pack] = group[u];
          out |= row.left_out(head + pack * kSize) << (u * kSize);
        } else {
          out |= Row::kWhole << (u * kSize);
        }
      }
      if (out == 0) {
        row.template add<false>(mine, group, out);
      } else {
        row.template add<true>(mine, group, out);
      }
    }
    if (at.has_single()) row.add_single(mine, at.single, to_float(at.data[at.single]));
    const Partial others = block_joined(mine, logit.unit, scratch[turn]);
    turn ^= 1;
    const Softmax sums = with_target(row, others, x, nll + r);
    if (!gradient) continue;

    const float weight = row_weights[r];
    if (weight == 0) {
      at.clear();
      continue;
    }
    const float scaled = weight * scale, max_level = sums.max_level;
    const float factor = scaled / sums.total;
    const float at_target = sums.at_target(row, x, scaled);
    if (at.has_single()) {
      T& single = at.data[at.single];
      single =
          from_float<T>(row.gradient(to_float(single), at.single, max_level, factor, at_target));
    }
    const auto rewrite = [&](int pack, const Pack<T>& old) {
      const int token = head + pack * kSize;
      const unsigned out = row.left_out(token);
      float values[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        values[j] = logit.power(to_float(old.at[j]), max_level, factor);
      }
      if (out != 0) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float left = token + j == row.target ? at_target : 0;
          values[j] = out >> j & 1 ? left : values[j];
        }
      }
      store16_global(at.body + pack * kSize, to_pack<T>(values));
    };
    // load16, as nvcc would read what keep[i] copies element by element.
    int i = thread;
    for (; i < min(kept, packs); i += threads) rewrite(i, load16(keep[i].at));
    for (; i < packs; i += kAgain * threads) {
      Pack<T> group[kAgain];
#pragma unroll
      for (int u = 0; u < kAgain; ++u) {
        const int pack = i + u * threads;
        if (pack < packs) group[u] = load16(at.body + pack * kSize);
      }
#pragma unroll
      for (int u = 0; u < kAgain; ++u) {
        const int pack = i + u * threads;
        if (pack < packs) rewrite(pack, group[u]);
      }
    }
  }
}

__global__ void __launch_bounds__(256)
    set_banned_tokens(const std::int64_t* ids, std::int64_t count, std::int64_t vocab,
                      std::uint32_t* mask) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count || ids[i] < 0 || ids[i] >= vocab) return;
  atomicOr(&mask[ids[i] / 32], 1u << (ids[i] % 32));
}

template <class T>
__global__ void __launch_bounds__(256)
    scale_elements(T* data, std::int64_t count, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  const Cut<T> cut(data, count);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  T* const body = data + cut.head;
  for (std::int64_t i = first; i < cut.packs; i += step) {
    const Pack<T> pack = load16(body + i * Pack<T>::size);
    float values[Pack<T>::size];
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j) values[j] = to_float(pack.at[j]) * by;
    store16(body + i * Pack<T>::size, to_pack<T>(values));
  }
  // At most 14 single elements, before and behind the packs.
  const std::int64_t single = first < cut.head ? first : cut.tail + first - cut.head;
  if (single < count && (first < cut.head || single >= cut.tail)) {
    data[single] = from_float<T>(to_float(data[single]) * by);
  }
}

}  // namespace quietstar::cuda
