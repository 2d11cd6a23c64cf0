// What the kernels of softmax_cross_entropy share: how a row is cut, what a logit's level is, sums
// of powers of two, and a row's end.
//
// The target is left out of the running sum. So 1 - p of a target that is almost certain is the sum
// of the others over the total, without cancellation, and its loss is log1p of it.
#pragma once

#include <cstdint>

#include "arch.cuh"
#include "reduce.cuh"

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

// A row of logits in memory, and which of the single elements beside its packs this thread has.
template <class T>
struct PlacedRow {
  T *data, *body;  // the first element, and the first one of a pack
  int vocab, head, packs, singles, single;
  __device__ __forceinline__ PlacedRow(T* first, int count) : data(first), vocab(count) {
    const Cut<T> cut(first, count);
    const int thread = static_cast<int>(threadIdx.x), tail = static_cast<int>(cut.tail);
    head = static_cast<int>(cut.head);
    packs = static_cast<int>(cut.packs);
    body = first + head;
    singles = head + count - tail;
    single = thread < head ? thread : tail + thread - head;  // those behind come after those before
  }
  __device__ __forceinline__ bool has_single() const {
    return static_cast<int>(threadIdx.x) < singles;
  }
  __device__ __forceinline__ void clear() const {
    for (int i = static_cast<int>(threadIdx.x); i < packs; i += static_cast<int>(blockDim.x)) {
      store16_global(body + i * Pack<T>::size, Pack<T>{});
    }
    if (has_single()) data[single] = from_float<T>(0);
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

// The same bits on all lanes, as the sums of a butterfly do not depend on the order of two numbers.
__device__ __forceinline__ Partial warp_joined(Partial p, float unit) {
  const float max_level = warp_reduce(p.max_level, Largest{});
  return {max_level, warp_reduce(p.sum * fast_exp2((p.max_level - max_level) * unit), Sum{})};
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

  int target;  // below -kSize: there is none
  const std::uint32_t* banned;
  Logit logit;

  __device__ __forceinline__ RowOfLogits(std::int64_t wanted, int vocab, const std::uint32_t* mask,
                                         const Logit& y)
      : target(wanted >= 0 && wanted < vocab ? static_cast<int>(wanted) : -kSize - 1),
        banned(mask),
        logit(y) {}
  __device__ __forceinline__ float target_logit(const T* data) const {
    return target >= 0 ? to_float(data[target]) : __uint_as_float(0x7fc00000u);
  }

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

// Sums over a row, in units of the largest level's power.
struct Softmax {
  float max_level, others, total;
  bool banned_target;

  template <class Row>
  __device__ __forceinline__ float at_target(const Row& row, float x, float scaled) const {
    return banned_target ? 0 : -scaled * row.logit.slope(x) * (others / total);
  }
};

// The target, whose logit is x, joins the others; one thread writes the loss.
template <class Row>
__device__ __forceinline__ Softmax with_target(const Row& row, Partial others, float x,
                                               float* nll) {
  const auto& logit = row.logit;
  const bool banned_target = row.target >= 0 && row.is_banned(row.target);
  const float level = logit.level(logit.key(x));
  const float max_level = banned_target ? others.max_level : fmaxf(others.max_level, level);
  const float sum = others.sum * fast_exp2((others.max_level - max_level) * logit.unit);
  const float own = banned_target ? 0 : fast_exp2(logit.below(x, max_level));
  const float total = sum + own;
  if (threadIdx.x == 0) {
    float loss;
    if (banned_target) {
      loss = __uint_as_float(0x7f800000u);
    } else if (sum < own) {
      loss = log1pf(sum / own);
    } else {
      float unit = logit.unit;
      keep(unit);  // as a double it would take two registers of the row's loop
      loss =
          static_cast<float>(kLn2 * (static_cast<double>(max_level) - level) * unit + logf(total));
    }
    *nll = loss;
  }
  return {max_level, sum, total, banned_target};
}

}  // namespace quietstar::cuda
