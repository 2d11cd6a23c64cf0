// Sixteen floats at a time, in the parts of vec_parts.h. Include from *_kernel.cpp files only.
#pragma once

#include "vec_parts.h"

namespace quietstar::QUIETSTAR_ISA {

constexpr int kParts = kLanes * static_cast<int>(sizeof(float)) / static_cast<int>(sizeof(Part));
constexpr int kPartLanes = kLanes / kParts;

#if QUIETSTAR_ISA_LEVEL > 0
// Not a loop, which the compiler would unroll too late to keep every part in a register.
#define QUIETSTAR_PARTWISE(expression) \
  Vec result;                          \
  {                                    \
    constexpr int i = 0;               \
    result.part[i] = (expression);     \
  }                                    \
  if constexpr (kParts > 1) {          \
    constexpr int i = kParts - 1;      \
    result.part[i] = (expression);     \
  }                                    \
  return result
#else
#define QUIETSTAR_PARTWISE(expression)                            \
  Vec result;                                                     \
  for (int i = 0; i < kParts; ++i) result.part[i] = (expression); \
  return result
#endif

struct Vec {
  Part part[kParts];
  static Vec fill(float x) { QUIETSTAR_PARTWISE(splat(x)); }
  template <class T>
  static Vec load(const T* p) {
    QUIETSTAR_PARTWISE(QUIETSTAR_ISA::load(p + i * kPartLanes));
  }
  void store(float* p) const {
    for (int i = 0; i < kParts; ++i) QUIETSTAR_ISA::store(p + i * kPartLanes, part[i]);
  }

  friend Vec operator+(Vec a, Vec b) { QUIETSTAR_PARTWISE(a.part[i] + b.part[i]); }
  friend Vec operator-(Vec a, Vec b) { QUIETSTAR_PARTWISE(a.part[i] - b.part[i]); }
  friend Vec operator*(Vec a, Vec b) { QUIETSTAR_PARTWISE(a.part[i] * b.part[i]); }
  friend Vec operator/(Vec a, Vec b) { QUIETSTAR_PARTWISE(a.part[i] / b.part[i]); }
  friend Vec fma(Vec a, Vec b, Vec c) { QUIETSTAR_PARTWISE(fma(a.part[i], b.part[i], c.part[i])); }
  friend Vec max(Vec a, Vec b) { QUIETSTAR_PARTWISE(max(a.part[i], b.part[i])); }
  friend Vec min(Vec a, Vec b) { QUIETSTAR_PARTWISE(min(a.part[i], b.part[i])); }
  friend Vec zero_where_below(Vec e, Vec x, Vec floor) {
    QUIETSTAR_PARTWISE(zero_where_below(e.part[i], x.part[i], floor.part[i]));
  }
  // 2^(x c - shift), shift an integer, to about one unit in the last place, as the product is not
  // rounded. Needs |x c| < 2^22 and -126 <= x c - shift <= 127; a NaN gives NaN; else unspecified.
  friend Vec exp2_of_product(Vec x, TwoFloats c, Vec shift) {
    QUIETSTAR_PARTWISE(exp2_of_product(x.part[i], c, shift.part[i]));
  }
  // 2^x, 0 below x = -126 and for -inf; NaN stays. Needs x <= 127.
  friend Vec exp2_or_zero(Vec x) { QUIETSTAR_PARTWISE(exp2_or_zero(x.part[i])); }
  friend Vec tanh_of(Vec y) { QUIETSTAR_PARTWISE(tanh_of(y.part[i])); }
  // For any first and last.
  friend Vec keep_lanes(Vec x, std::int64_t first, std::int64_t last, Vec y) {
    const auto lane = [](std::int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n); };
    const int a = lane(first), b = lane(last);
    QUIETSTAR_PARTWISE(keep_lanes(x.part[i], a - i * kPartLanes, b - i * kPartLanes, y.part[i]));
  }
};
#undef QUIETSTAR_PARTWISE

template <class T>
static inline void store(T* p, Vec x) {
  for (int i = 0; i < kParts; ++i) store(p + i * kPartLanes, x.part[i]);
}

// Whether some lane has a > b.
static inline bool any_above(Vec a, Vec b) {
  bool any = false;
  for (int i = 0; i < kParts; ++i) any |= any_above(a.part[i], b.part[i]);
  return any;
}
static inline float reduce_max(Vec a) {
  Part all = a.part[0];
  for (int i = 1; i < kParts; ++i) all = max(a.part[i], all);
  return reduce_max(all);
}
static inline float reduce_add(Vec a) {
  Part all = a.part[0];
  for (int i = 1; i < kParts; ++i) all = all + a.part[i];
  return reduce_add(all);
}

// Writes the lanes with x >= floor to out, in order, and returns how many; may write up to kLanes
// floats.
static inline int append_at_least(float* out, Vec x, Vec floor) {
#if QUIETSTAR_ISA_LEVEL == 2
  const __mmask16 keep = _mm512_cmp_ps_mask(x.part[0], floor.part[0], _CMP_GE_OQ);
  if (!keep) return 0;
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(keep, x.part[0]));
  return __builtin_popcount(keep);
#elif QUIETSTAR_ISA_LEVEL == 1
  const int keep = _mm256_movemask_ps(_mm256_cmp_ps(x.part[0], floor.part[0], _CMP_GE_OQ)) |
                   _mm256_movemask_ps(_mm256_cmp_ps(x.part[1], floor.part[1], _CMP_GE_OQ)) << 8;
  if (!keep) return 0;
  float lane[kLanes];
  x.store(lane);
  int count = 0;
  for (int bits = keep; bits; bits &= bits - 1) out[count++] = lane[__builtin_ctz(bits)];
  return count;
#else
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[count] = x.part[i];
    count += x.part[i] >= floor.part[i];
  }
  return count;
#endif
}

// Adds lanes in double precision.
struct DoubleSum {
#if QUIETSTAR_ISA_LEVEL == 2
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(Vec x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.part[0])));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.part[0], 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
#elif QUIETSTAR_ISA_LEVEL == 1
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  void add(Vec x) {
    for (int i = 0; i < kParts; ++i) {
      low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(x.part[i])));
      high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(x.part[i], 1)));
    }
  }
  double total() const {
    double lane[4];
    _mm256_storeu_pd(lane, _mm256_add_pd(low, high));
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
#else
  double lane[kLanes] = {};
  void add(Vec x) {
    for (int i = 0; i < kLanes; ++i) lane[i] += static_cast<double>(x.part[i]);
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lane[i];
    return sum;
  }
#endif
};

}  // namespace quietstar::QUIETSTAR_ISA
