// Kernels of softmax_cross_entropy on a device.
//
// What: nll and gradient of rows of logits, as quietstar/linear_cross_entropy.h defines them.
// Tiling: a row per block, a block goes from row to row. Its threads take 16 bytes at a time, four
//   such loads under way each, and keep a running maximum and sum of exponentials (Milakov and
//   Gimelshein 2018, arXiv 1805.02867), rescaled once per four loads. What a thread has read stays
//   in shared memory, as far as that reaches, in places that only this thread uses: the second
//   pass, which writes the gradient, reads it from there, and the rest of the row again, from L2.
//   So the only barrier of a row is the one that joins the threads' sums.
// Bytes: the loss reads an element once. The gradient reads and writes it once; of a row that is
//   longer than shared memory (227 KB on sm_90: 115,000 tokens in bf16) it reads the rest twice.
// Operations: some 12 instructions an element in both passes, 2 of them exp2; with a softcap about
//   40, 6 of them by the special-function unit, which then bounds the rate rather than memory.
//
// The target is left out of the running sum. So 1 - p of a target that is almost certain is the sum
// of the others over the total, without cancellation, and its loss is log1p of it.
#pragma once

#include <cstdint>

#include "arch.cuh"

namespace quietstar::cuda {

constexpr int kMaxRowThreads = 1024;
constexpr float kLowest = -3.402823466e38f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994531;

// A sequence in memory, cut at 16-byte boundaries: `head` single elements, `packs` aligned packs,
// and single elements to the end.
template <class T>
struct Cut {
  std::int64_t head, packs, tail;
  __device__ __forceinline__ Cut(const T* p, std::int64_t count) {
    const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) & 15);
    head = past == 0 ? 0 : (16 - past) / static_cast<std::int64_t>(sizeof(T));
    head = min(head, count);
    packs = (count - head) / Pack<T>::size;
    tail = head + packs * Pack<T>::size;
  }
};

// A pack of rounded numbers, two at a time for 16-bit types.
template <class T>
__device__ __forceinline__ Pack<T> to_pack(const float (&x)[Pack<T>::size]) {
  if constexpr (sizeof(T) == 4) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j) pack.at[j] = from_float<T>(x[j]);
    return pack;
  } else {
    union {
      unsigned pairs[4];
      Pack<T> pack;
    } u;
#pragma unroll
    for (int j = 0; j < 4; ++j) u.pairs[j] = pack2<T>(x[2 * j], x[2 * j + 1]);
    return u.pack;
  }
}

// y = cap(logit_scale x) / temperature = ln 2 unit level(x), unit > 0. The levels are subtracted
// before they are multiplied, so that what is near the largest is exact and nothing overflows:
//   key(x)                   cheap, and the level grows with it
//   level(key)
//   below(x, max_level)      unit (level - max_level), the power of two that e^(y - ...) is
//   power(x, max_level, factor)   factor 2^below dy/dx temperature / logit_scale
//   slope(x)                 dy/dx temperature / logit_scale
struct PlainLogit {
  static constexpr int kLoads = 4;  // of 16 bytes, under way per thread
  float sign, unit;
  __device__ __forceinline__ float key(float x) const { return x * sign; }
  __device__ __forceinline__ float level(float key) const { return key; }
  __device__ __forceinline__ float below(float x, float max_level) const {
    return fmaf(x, sign, -max_level) * unit;
  }
  __device__ __forceinline__ float power(float x, float max_level, float factor) const {
    return fast_exp2(below(x, max_level)) * factor;
  }
  __device__ __forceinline__ float slope(float) const { return 1; }
};

struct CappedLogit {
  static constexpr int kLoads = 2;  // bound by arithmetic
  float inner, unit;                // level = tanh(inner x)

  // tanh(u), and exp(-2 |u|).
  __device__ __forceinline__ float tanh(float u, float* e) const {
    const float size = fabsf(u);
    *e = fast_exp2(-2 * kLog2E * size);
    const float far = __fdividef(1 - *e, 1 + *e);
    // Near 0 that cancels; Taylor's series to u^13 has a relative error of 4e-9 at 0.4.
    const float square = u * u;
    float p = 21844.0f / 6081075.0f;
    p = fmaf(p, square, -1382.0f / 155925.0f);
    p = fmaf(p, square, 62.0f / 2835.0f);
    p = fmaf(p, square, -17.0f / 315.0f);
    p = fmaf(p, square, 2.0f / 15.0f);
    p = fmaf(p, square, -1.0f / 3.0f);
    return size < 0.4f ? fmaf(p * square, u, u) : copysignf(far, u);
  }
  __device__ __forceinline__ float key(float x) const { return x * inner; }
  __device__ __forceinline__ float level(float key) const {
    float e;
    return tanh(key, &e);
  }
  __device__ __forceinline__ float below(float x, float max_level) const {
    return (level(key(x)) - max_level) * unit;
  }
  __device__ __forceinline__ float power(float x, float max_level, float factor) const {
    float e;
    const float mine = tanh(key(x), &e);
    return fast_exp2((mine - max_level) * unit) * (factor * square_of_sech(e));
  }
  __device__ __forceinline__ float slope(float x) const {
    float e;
    tanh(x * inner, &e);
    return square_of_sech(e);
  }
  static __device__ __forceinline__ float square_of_sech(float e) {
    return __fdividef(4 * e, (1 + e) * (1 + e));  // 1 - tanh^2
  }
};

// sum = Σ 2^below over some tokens, max_level the largest of their levels.
struct Partial {
  float max_level, sum;
};

// Bit for bit the same for both orders of its arguments, so all lanes of a butterfly agree.
__device__ __forceinline__ Partial joined(Partial a, Partial b, float unit) {
  const float max_level = fmaxf(a.max_level, b.max_level);
  return {max_level, __fadd_rn(__fmul_rn(a.sum, fast_exp2((a.max_level - max_level) * unit)),
                               __fmul_rn(b.sum, fast_exp2((b.max_level - max_level) * unit)))};
}

__device__ __forceinline__ Partial warp_joined(Partial p, float unit) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Partial other{__shfl_xor_sync(kAllLanes, p.max_level, step),
                        __shfl_xor_sync(kAllLanes, p.sum, step)};
    p = joined(p, other, unit);
  }
  return p;
}

// The sum over the block, for every thread. scratch: 32 elements, used again after the next
// barrier.
__device__ __forceinline__ Partial block_joined(Partial p, float unit, Partial* scratch) {
  p = warp_joined(p, unit);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) scratch[threadIdx.x / 32] = p;
  __syncthreads();
  const bool there = lane < static_cast<int>(blockDim.x / 32);
  return warp_joined(there ? scratch[lane] : Partial{kLowest, 0}, unit);
}

// One row of logits and what is left out of its sum.
template <class T, class Logit>
struct RowOfLogits {
  static constexpr int kSize = Pack<T>::size;
  static constexpr unsigned kWhole = (1u << kSize) - 1;

  int target;
  const std::uint32_t* banned;
  Logit logit;

  __device__ __forceinline__ unsigned banned_from(int token) const {
    if (banned == nullptr) return 0;
    const std::uint64_t two = static_cast<std::uint64_t>(banned[token / 32 + 1]) << 32;
    return static_cast<unsigned>((two | banned[token / 32]) >> (token % 32)) & kWhole;
  }
  // A bit for each token of the pack at `token` that the sum leaves out.
  __device__ __forceinline__ unsigned left_out(int token) const {
    const unsigned at = static_cast<unsigned>(target - token);
    return banned_from(token) | (at < static_cast<unsigned>(kSize) ? 1u << at : 0u);
  }
  __device__ __forceinline__ bool is_banned(int token) const {
    return banned != nullptr && (banned[token / 32] >> (token % 32) & 1) != 0;
  }

  // Adds the tokens of some packs; out has kSize bits for each.
  template <bool some_out, int count>
  __device__ __forceinline__ void add(Partial& p, const Pack<T> (&packs)[count],
                                      unsigned out) const {
    float key = kLowest;
#pragma unroll
    for (int u = 0; u < count; ++u) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float mine = logit.key(to_float(packs[u].at[j]));
        key = fmaxf(key, some_out && (out >> (u * kSize + j) & 1) ? kLowest : mine);
      }
    }
    const float max_level = fmaxf(p.max_level, logit.level(key));
    float sum = 0;
#pragma unroll
    for (int u = 0; u < count; ++u) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float power = fast_exp2(logit.below(to_float(packs[u].at[j]), max_level));
        sum += some_out && (out >> (u * kSize + j) & 1) ? 0 : power;
      }
    }
    p = {max_level, p.sum * fast_exp2((p.max_level - max_level) * logit.unit) + sum};
  }

  __device__ __forceinline__ void add_single(Partial& p, int token, float x) const {
    if (token == target || is_banned(token)) return;
    const float max_level = fmaxf(p.max_level, logit.level(logit.key(x)));
    p = {max_level, p.sum * fast_exp2((p.max_level - max_level) * logit.unit) +
                        fast_exp2(logit.below(x, max_level))};
  }

  __device__ __forceinline__ float gradient(float x, int token, float max_level, float factor,
                                            float at_target) const {
    if (token == target) return at_target;
    return is_banned(token) ? 0 : logit.power(x, max_level, factor);
  }
};

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
    T* const data = logits + r * row_stride;
    const Cut<T> cut(data, vocab);
    const int head = static_cast<int>(cut.head), packs = static_cast<int>(cut.packs);
    const int tail = static_cast<int>(cut.tail), singles = head + vocab - tail;
    // This thread's single token: those before the packs, then those behind them.
    const int single = thread < head ? thread : tail + thread - head;
    T* const body = data + head;

    const auto write_zeros = [&] {
      for (int i = thread; i < packs; i += threads) store16_global(body + i * kSize, Pack<T>{});
      if (thread < singles) data[single] = from_float<T>(0);
    };
    if (valid_rows != nullptr && valid_rows[r] == 0) {
      if (thread == 0) nll[r] = 0;
      if (gradient) write_zeros();
      continue;
    }

    const std::int64_t wanted = targets[r];
    const bool known = wanted >= 0 && wanted < vocab;
    const Row row{known ? static_cast<int>(wanted) : -kSize - 1, banned, logit};
    // Read by all before anybody writes.
    const float x = known ? to_float(data[row.target]) : __uint_as_float(0x7fc00000u);

    Partial mine{kLowest, 0};
    for (int i = thread; i < packs; i += kLoads * threads) {
      Pack<T> group[kLoads];
      unsigned out = 0;
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pack = i + u * threads;
        group[u] = Pack<T>{};
        if (pack < packs) {
          const T* const from = body + pack * kSize;
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
    if (thread < singles) row.add_single(mine, single, to_float(data[single]));
    const Partial others = block_joined(mine, logit.unit, scratch[turn]);
    turn ^= 1;

    // The target joins.
    const bool banned_target = known && row.is_banned(row.target);
    const float level = logit.level(logit.key(x));
    const float max_level = banned_target ? others.max_level : fmaxf(others.max_level, level);
    const float sum = others.sum * fast_exp2((others.max_level - max_level) * logit.unit);
    const float own = banned_target ? 0 : fast_exp2(logit.below(x, max_level));
    const float total = sum + own;
    if (thread == 0) {
      float loss;
      if (banned_target) {
        loss = __uint_as_float(0x7f800000u);
      } else if (sum < own) {
        loss = log1pf(sum / own);
      } else {
        loss = static_cast<float>(kLn2 * (static_cast<double>(max_level) - level) * logit.unit +
                                  logf(total));
      }
      nll[r] = loss;
    }
    if (!gradient) continue;

    const float weight = row_weights[r];
    if (weight == 0) {
      write_zeros();
      continue;
    }
    const float scaled = weight * scale;
    const float factor = scaled / total;
    const float at_target = banned_target ? 0 : -scaled * logit.slope(x) * (sum / total);
    if (thread < singles) {
      const float value =
          row.gradient(to_float(data[single]), single, max_level, factor, at_target);
      data[single] = from_float<T>(value);
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
      store16_global(body + pack * kSize, to_pack<T>(values));
    };
    // load16, as nvcc would read what keep[i] copies element by element.
    int i = thread;
    for (; i < min(kept, packs); i += threads) rewrite(i, load16(keep[i].at));
    for (; i < packs; i += kAgain * threads) {
      Pack<T> group[kAgain];
#pragma unroll
      for (int u = 0; u < kAgain; ++u) {
        const int pack = i + u * threads;
        if (pack < packs) group[u] = load16(body + pack * kSize);
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
