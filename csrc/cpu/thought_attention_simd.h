// Vector pieces of the attention kernels that vec.h does not have: exponentials, masks, loads and
// stores of rows, transposition. For *_kernel.cpp files only, like vec.h.
#pragma once

#include "vec.h"

namespace quietstar::QUIETSTAR_ISA {

// 2^r - 1 for |r| <= 1/2
static inline Vec exp2_fraction(Vec r) {
  Vec p = Vec::fill(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, Vec::fill(kExp2[i]));
  return p * r;
}

// ---- what the instruction sets do differently. What the functions mean:
//   exp2_or_zero(x)               2^x, 0 below x = -126 and for -inf; NaN stays. Needs x <= 127.
//   split(x, r, s)                x = n + r with |r| <= 1/2, s = 2^n; needs 0 <= x <= 127
//   keep_lanes(x, first, last, y) x in the lanes first .. last - 1, y in the others; any integers
//   any_above(a, b)               whether a lane has a > b
//   minimum(a, b)                 b where either is NaN
//   copy_sign(x, s)               |x| with the sign of s

#if QUIETSTAR_ISA_LEVEL == 2

static inline Vec exp2_or_zero(Vec x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r{_mm512_sub_ps(x.v, n)};
  Vec p = Vec::fill(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, Vec::fill(kExp2[i]));
  p = fma(p, r, Vec::fill(1.0f));
  return {_mm512_maskz_scalef_ps(keep, p.v, n)};
}
static inline void split(Vec x, Vec& r, Vec& s) {
  const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  r = {_mm512_sub_ps(x.v, n)};
  s = {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n)};
}
static inline Vec keep_lanes(Vec x, std::int64_t first, std::int64_t last, Vec y) {
  const std::int64_t a = first < 0 ? 0 : first > 16 ? 16 : first;
  const std::int64_t b = last < 0 ? 0 : last > 16 ? 16 : last;
  const auto mask = static_cast<__mmask16>(((1u << b) - 1) & ~((1u << a) - 1));
  return {_mm512_mask_mov_ps(y.v, mask, x.v)};
}
static inline bool any_above(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}
static inline Vec divide(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
static inline float reduce_add(Vec a) {
  return _mm512_reduce_add_ps(a.v);
}
static inline Vec copy_sign(Vec x, Vec s) {
  const __m512 sign = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(sign, x.v), _mm512_and_ps(sign, s.v))};
}
static inline Vec minimum(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}

#elif QUIETSTAR_ISA_LEVEL == 1

static inline __m256 exp2_or_zero(__m256 x) {
  const __m256 keep = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp2[i]));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  return _mm256_and_ps(p, keep);
}
static inline Vec exp2_or_zero(Vec x) {
  return {exp2_or_zero(x.a), exp2_or_zero(x.b)};
}
static inline void split(__m256 x, __m256& r, __m256& s) {
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  r = _mm256_sub_ps(x, n);
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  s = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static inline void split(Vec x, Vec& r, Vec& s) {
  split(x.a, r.a, s.a);
  split(x.b, r.b, s.b);
}
static inline Vec keep_lanes(Vec x, std::int64_t first, std::int64_t last, Vec y) {
  const int a = first < 0 ? 0 : first > 16 ? 16 : static_cast<int>(first);
  const int b = last < 0 ? 0 : last > 16 ? 16 : static_cast<int>(last);
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  const __m256i from = _mm256_set1_epi32(a - 1), to = _mm256_set1_epi32(b);
  const auto inside = [&](__m256i lane) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_cmpgt_epi32(lane, from), _mm256_cmpgt_epi32(to, lane)));
  };
  return {_mm256_blendv_ps(y.a, x.a, inside(low)), _mm256_blendv_ps(y.b, x.b, inside(high))};
}
static inline bool any_above(Vec x, Vec y) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ),
                                         _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))) != 0;
}
static inline Vec divide(Vec x, Vec y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
static inline float reduce_add(Vec x) {
  const __m256 m = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline Vec copy_sign(Vec x, Vec s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, x.a), _mm256_and_ps(sign, s.a)),
          _mm256_or_ps(_mm256_andnot_ps(sign, x.b), _mm256_and_ps(sign, s.b))};
}
static inline Vec minimum(Vec x, Vec y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}

#else

#define QUIETSTAR_LANEWISE(expression)                         \
  Vec result;                                                  \
  for (int i = 0; i < kLanes; ++i) result.v[i] = (expression); \
  return result

// Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
static inline float pow2_of_integer(float shifted) {
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return from_bits((bits + 127u) << 23);
}
static inline Vec exp2_or_zero(Vec x) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) {
    const float y = x.v[i] < -126.0f ? -126.0f : x.v[i];
    const float shifted = y + 0x1.8p23f, r = y - (shifted - 0x1.8p23f);
    float p = kExp2[0];
    for (int k = 1; k < 6; ++k) p = p * r + kExp2[k];
    const float power = (p * r + 1.0f) * pow2_of_integer(shifted);
    result.v[i] = x.v[i] < -126.0f ? 0.0f : power;
  }
  return result;
}
static inline void split(Vec x, Vec& r, Vec& s) {
  for (int i = 0; i < kLanes; ++i) {
    const float shifted = x.v[i] + 0x1.8p23f;
    r.v[i] = x.v[i] - (shifted - 0x1.8p23f);
    s.v[i] = pow2_of_integer(shifted);
  }
}
static inline Vec keep_lanes(Vec x, std::int64_t first, std::int64_t last, Vec y) {
  QUIETSTAR_LANEWISE(i >= first && i < last ? x.v[i] : y.v[i]);
}
static inline bool any_above(Vec a, Vec b) {
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= a.v[i] > b.v[i];
  return any;
}
static inline Vec divide(Vec a, Vec b) {
  QUIETSTAR_LANEWISE(a.v[i] / b.v[i]);
}
static inline float reduce_add(Vec a) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += a.v[i];
  return sum;
}
static inline Vec copy_sign(Vec x, Vec s) {
  QUIETSTAR_LANEWISE(__builtin_copysignf(x.v[i], s.v[i]));
}
static inline Vec minimum(Vec a, Vec b) {
  QUIETSTAR_LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
#undef QUIETSTAR_LANEWISE

#endif

// tanh to a few units in the last place: with E = e^(2|y|) - 1, which the split keeps exact near 0,
// tanh|y| = E / (E + 2).
static inline Vec tanh_of(Vec y) {
  constexpr float kTwoLog2E = 2.885390082f;
  const Vec z = minimum(Vec::fill(40.0f), copy_sign(y, Vec::fill(0.0f)) * Vec::fill(kTwoLog2E));
  Vec r, s;
  split(z, r, s);
  const Vec e = fma(s, exp2_fraction(r), s - Vec::fill(1.0f));
  return copy_sign(divide(e, e + Vec::fill(2.0f)), y);
}

// ---- loads and stores with a tail

static inline void from_float(float x, float& to) {
  to = x;
}
static inline void from_float(float x, BFloat16& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u
                                                                          : rounded);
}
static inline void from_float(float x, Float16& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // a subnormal half: adding 1/2 leaves its bits at the low end
    float shifted = from_bits(rest) + 0.5f;
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<std::uint16_t>(sign | half);
}

template <class T>
static inline Vec load_head(const T* p, std::int64_t count) {
  if (count >= kLanes) return Vec::load(p);
  float lane[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lane[i] = to_float(p[i]);
  return Vec::load(lane);
}

// row[0, padded) = from[0, size) * factor, then zeros
template <class T>
static inline void load_row(const T* from, std::int64_t size, std::int64_t padded, float factor,
                            float* row) {
  const Vec f = Vec::fill(factor);
  for (std::int64_t d = 0; d < padded; d += kLanes) {
    (load_head(from + d, size - d) * f).store(row + d);
  }
}

template <class T>
static inline void store_row(const float* row, std::int64_t size, float factor, T* to) {
  for (std::int64_t d = 0; d < size; ++d) from_float(row[d] * factor, to[d]);
}

// to[d][0, 16) = from row i, element d, for i < rows <= 16 and d < size; zeros for other rows
template <class T>
static inline void transpose(const T* from, std::int64_t stride, std::int64_t rows,
                             std::int64_t size, float* to) {
  for (std::int64_t d0 = 0; d0 < size; d0 += kLanes) {
    const std::int64_t count = size - d0 < kLanes ? size - d0 : kLanes;
#if QUIETSTAR_ISA_LEVEL == 2
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) {
      r[i] = i < rows ? load_head(from + i * stride + d0, count).v : _mm512_setzero_ps();
    }
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const auto low = [&](int j) { return _mm512_castps_pd(t[4 * i + j]); };
      r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low(0), low(2)));
      r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low(0), low(2)));
      r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(low(1), low(3)));
      r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(low(1), low(3)));
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
      r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
      r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
    }
    for (int i = 0; i < 16; ++i) {
      if (i < count) _mm512_storeu_ps(to + (d0 + i) * kLanes, r[i]);
    }
#else
    for (int i = 0; i < kLanes; ++i) {
      for (std::int64_t d = d0; d < d0 + count; ++d) {
        to[d * kLanes + i] = i < rows ? to_float(from[i * stride + d]) : 0.0f;
      }
    }
#endif
  }
}

}  // namespace quietstar::QUIETSTAR_ISA
