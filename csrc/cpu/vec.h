// Sixteen floats at a time, for AVX-512, AVX2 and plain C++. Include from *_kernel.cpp files only:
// everything here lives in the namespace of the instruction set that the file is compiled for.
//
// Kernel files keep to this header, <cmath> scalars and raw pointers. A template or inline function
// of the standard library compiled here would be shared with the other instruction sets by the
// linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "quietstar/types.h"

#if QUIETSTAR_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace quietstar::QUIETSTAR_ISA {

constexpr int kLanes = 16;

// 2^r for |r| <= 1/2 is 1 + r P(r), minimax in the relative error: 2e-9 before rounding.
constexpr float kExp2[] = {1.535336194e-04f, 1.339887440e-03f, 9.618437357e-03f,
                           5.550332471e-02f, 2.402264791e-01f, 6.931472029e-01f};

static inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(float x) {
  return x;
}
static inline float to_float(BFloat16 x) {
  return from_bits(std::uint32_t{x.bits} << 16);
}
static inline float to_float(Float16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Shifted into place, every finite half (subnormals too) is 2^112 too small.
  return from_bits(sign | (rest << 13)) * 0x1p112f;
}

// A number as the sum of two floats: hi + lo has 48 bits.
struct TwoFloats {
  float hi, lo;
  explicit TwoFloats(double x)
      : hi(static_cast<float>(x)), lo(static_cast<float>(x - static_cast<double>(hi))) {}
};

#if QUIETSTAR_ISA_LEVEL == 2  // ---------------------------------------------------------- AVX-512

struct Vec {
  __m512 v;
  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};

static inline Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
static inline Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
static inline float reduce_max(Vec a) {
  return _mm512_reduce_max_ps(a.v);
}

static inline Vec zero_where_below(Vec e, Vec x, Vec floor) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, floor.v, _CMP_NLT_UQ), e.v)};
}

static inline int append_at_least(float* out, Vec x, Vec floor) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, floor.v, _CMP_GE_OQ);
  if (!keep) return 0;
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(keep, x.v));
  return __builtin_popcount(keep);
}

static inline Vec exp2_of_product(Vec x, TwoFloats c, Vec shift) {
  const __m512 hi = _mm512_set1_ps(c.hi);
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(x.v, hi), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fmsub_ps(x.v, hi, n);
  r = _mm512_fmadd_ps(x.v, _mm512_set1_ps(c.lo), r);
  __m512 p = _mm512_set1_ps(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp2[i]));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(p, _mm512_sub_ps(n, shift.v))};
}

struct DoubleSum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(Vec x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#elif QUIETSTAR_ISA_LEVEL == 1  // ----------------------------------------------------------- AVX2

struct Vec {
  __m256 a, b;
  static Vec fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vec load(const BFloat16* p) { return {widen(p), widen(p + 8)}; }
  static Vec load(const Float16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }

 private:
  static __m256 widen(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

static inline Vec operator+(Vec x, Vec y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
static inline Vec operator-(Vec x, Vec y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
static inline Vec operator*(Vec x, Vec y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
static inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline Vec max(Vec x, Vec y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
static inline float reduce_max(Vec x) {
  const __m256 m = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

static inline Vec zero_where_below(Vec e, Vec x, Vec floor) {
  return {_mm256_and_ps(e.a, _mm256_cmp_ps(x.a, floor.a, _CMP_NLT_UQ)),
          _mm256_and_ps(e.b, _mm256_cmp_ps(x.b, floor.b, _CMP_NLT_UQ))};
}

static inline int append_at_least(float* out, Vec x, Vec floor) {
  const int keep = _mm256_movemask_ps(_mm256_cmp_ps(x.a, floor.a, _CMP_GE_OQ)) |
                   _mm256_movemask_ps(_mm256_cmp_ps(x.b, floor.b, _CMP_GE_OQ)) << 8;
  if (!keep) return 0;
  float lane[kLanes];
  x.store(lane);
  int count = 0;
  for (int bits = keep; bits; bits &= bits - 1) out[count++] = lane[__builtin_ctz(bits)];
  return count;
}

static inline __m256 exp2_of_product(__m256 x, TwoFloats c, __m256 shift) {
  const __m256 hi = _mm256_set1_ps(c.hi);
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, hi), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fmsub_ps(x, hi, n);
  r = _mm256_fmadd_ps(x, _mm256_set1_ps(c.lo), r);
  __m256 p = _mm256_set1_ps(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp2[i]));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent =
      _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_sub_ps(n, shift)), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
static inline Vec exp2_of_product(Vec x, TwoFloats c, Vec shift) {
  return {exp2_of_product(x.a, c, shift.a), exp2_of_product(x.b, c, shift.b)};
}

struct DoubleSum {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  void add(Vec x) {
    add(x.a);
    add(x.b);
  }
  double total() const {
    double lane[4];
    _mm256_storeu_pd(lane, _mm256_add_pd(low, high));
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }

 private:
  void add(__m256 x) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  }
};

#else  // --------------------------------------------------------------------------------- plain
       // C++

struct Vec {
  float v[kLanes];
  static Vec fill(float x) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
  }
  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
};

#define QUIETSTAR_LANEWISE(expression)                    \
  Vec r;                                                  \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expression); \
  return r

static inline Vec operator+(Vec a, Vec b) {
  QUIETSTAR_LANEWISE(a.v[i] + b.v[i]);
}
static inline Vec operator-(Vec a, Vec b) {
  QUIETSTAR_LANEWISE(a.v[i] - b.v[i]);
}
static inline Vec operator*(Vec a, Vec b) {
  QUIETSTAR_LANEWISE(a.v[i] * b.v[i]);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  QUIETSTAR_LANEWISE(a.v[i] * b.v[i] + c.v[i]);
}
static inline Vec max(Vec a, Vec b) {
  QUIETSTAR_LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
static inline Vec zero_where_below(Vec e, Vec x, Vec floor) {
  QUIETSTAR_LANEWISE(x.v[i] < floor.v[i] ? 0.0f : e.v[i]);
}
#undef QUIETSTAR_LANEWISE

static inline float reduce_max(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

static inline int append_at_least(float* out, Vec x, Vec floor) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[count] = x.v[i];
    count += x.v[i] >= floor.v[i];
  }
  return count;
}

static inline Vec exp2_of_product(Vec x, TwoFloats c, Vec shift) {
  // Without a fused multiply-add the product is formed in double. Adding 1.5 * 2^52 rounds to an
  // integer and leaves that integer in the low bits, for any |x * c| < 2^31.
  const double wide = static_cast<double>(c.hi) + static_cast<double>(c.lo);
  Vec result;
  for (int i = 0; i < kLanes; ++i) {
    const double y = static_cast<double>(x.v[i]) * wide;
    const double n = (y + 0x1.8p52) - 0x1.8p52;
    const float r = static_cast<float>(y - n);
    float p = kExp2[0];
    for (int k = 1; k < 6; ++k) p = p * r + kExp2[k];
    const double exponent = (n - static_cast<double>(shift.v[i])) + 0x1.8p52;
    std::uint64_t bits;
    std::memcpy(&bits, &exponent, sizeof bits);
    result.v[i] = (p * r + 1.0f) * from_bits((static_cast<std::uint32_t>(bits) + 127u) << 23);
  }
  return result;
}

struct DoubleSum {
  double lane[kLanes] = {};
  void add(Vec x) {
    for (int i = 0; i < kLanes; ++i) lane[i] += static_cast<double>(x.v[i]);
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lane[i];
    return sum;
  }
};

#endif

// What the operations above mean, where the name does not say it:
//   max(a, b)                     b where either is NaN
//   zero_where_below(e, x, floor) 0 where x < floor, else e; a NaN in x keeps e
//   append_at_least(out, x, f)    writes the lanes with x >= f to out, in order, returns how many;
//                                 may write up to kLanes floats
//   exp2_of_product(x, c, shift)  2^(x c - shift), shift an integer, to about one unit in the last
//                                 place, as the product is not rounded. Needs |x c| < 2^22 and
//                                 -126 <= x c - shift <= 127; a NaN gives NaN; else unspecified.
//   DoubleSum                     adds lanes in double precision

}  // namespace quietstar::QUIETSTAR_ISA
