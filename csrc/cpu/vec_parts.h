// What one instruction takes of sixteen floats, for AVX-512, AVX2 and plain C++: the functions that
// vec.h applies to each part of a vector. Include from *_kernel.cpp files only: everything here
// lives in the namespace of the instruction set that the file is compiled for.
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
static inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
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

// Rounds to the nearest, ties to even, as every store here.
static inline void put(float* p, float x) {
  *p = x;
}
static inline void put(BFloat16* p, float x) {
  const std::uint32_t bits = to_bits(x);
  const std::uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  p->bits = static_cast<std::uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);
}
static inline void put(Float16* p, float x) {
  const std::uint32_t bits = to_bits(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (size >= 0x38800000u) {  // normal
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded
    half = to_bits(from_bits(size) + 0.5f) - 0x3f000000u;
  }
  p->bits = static_cast<std::uint16_t>(sign | half);
}

// A number as the sum of two floats: hi + lo has 48 bits.
struct TwoFloats {
  float hi, lo;
  explicit TwoFloats(double x)
      : hi(static_cast<float>(x)), lo(static_cast<float>(x - static_cast<double>(hi))) {}
};

// ---- a Part is what one instruction takes: 16, 8 or 1 of the floats, with + - * and / of the
// language. Of the functions:
//   max(a, b), min(a, b)          b where either is NaN
//   zero_where_below(e, x, floor) 0 where x < floor, else e; a NaN in x keeps e
//   rounded(x)                    to the nearest integer, for |x| < 2^22
//   times_power(p, n)             p 2^n for an integer n, -126 <= n <= 127
//   copy_sign(x, s)               |x| with the sign of s
//   keep_lanes(x, first, last, y) x in the lanes first .. last - 1, y in the others

#if QUIETSTAR_ISA_LEVEL == 2  // ---------------------------------------------------------- AVX-512

using Part = __m512;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

static inline Part splat(float x) {
  return _mm512_set1_ps(x);
}
static inline Part load(const float* p) {
  return _mm512_loadu_ps(p);
}
static inline Part load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Part load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(float* p, Part x) {
  _mm512_storeu_ps(p, x);
}
static inline void store(BFloat16* p, Part x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits,
                            _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
static inline void store(Float16* p, Part x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, kNearest));
}
static inline Part fma(Part a, Part b, Part c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline Part fms(Part a, Part b, Part c) {
  return _mm512_fmsub_ps(a, b, c);
}
static inline Part max(Part a, Part b) {
  return _mm512_max_ps(a, b);
}
static inline Part min(Part a, Part b) {
  return _mm512_min_ps(a, b);
}
static inline Part zero_where_below(Part e, Part x, Part floor) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, floor, _CMP_NLT_UQ), e);
}
static inline bool any_above(Part a, Part b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}
static inline Part rounded(Part x) {
  return _mm512_roundscale_ps(x, kNearest);
}
static inline Part times_power(Part p, Part n) {
  return _mm512_scalef_ps(p, n);
}
static inline Part copy_sign(Part x, Part s) {
  const __m512 sign = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(sign, x), _mm512_and_ps(sign, s));
}
static inline Part keep_lanes(Part x, int first, int last, Part y) {
  const auto mask = static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
  return _mm512_mask_mov_ps(y, mask, x);
}
static inline float reduce_max(Part a) {
  return _mm512_reduce_max_ps(a);
}
static inline float reduce_add(Part a) {
  return _mm512_reduce_add_ps(a);
}

#elif QUIETSTAR_ISA_LEVEL == 1  // ----------------------------------------------------------- AVX2

using Part = __m256;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

static inline Part splat(float x) {
  return _mm256_set1_ps(x);
}
static inline Part load(const float* p) {
  return _mm256_loadu_ps(p);
}
static inline Part load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Part load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(float* p, Part x) {
  _mm256_storeu_ps(p, x);
}
static inline void store(BFloat16* p, Part x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
}
static inline void store(Float16* p, Part x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, kNearest));
}
static inline Part fma(Part a, Part b, Part c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline Part fms(Part a, Part b, Part c) {
  return _mm256_fmsub_ps(a, b, c);
}
static inline Part max(Part a, Part b) {
  return _mm256_max_ps(a, b);
}
static inline Part min(Part a, Part b) {
  return _mm256_min_ps(a, b);
}
static inline Part zero_where_below(Part e, Part x, Part floor) {
  return _mm256_and_ps(e, _mm256_cmp_ps(x, floor, _CMP_NLT_UQ));
}
static inline bool any_above(Part a, Part b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
static inline Part rounded(Part x) {
  return _mm256_round_ps(x, kNearest);
}
static inline Part times_power(Part p, Part n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static inline Part copy_sign(Part x, Part s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(sign, x), _mm256_and_ps(sign, s));
}
static inline Part keep_lanes(Part x, int first, int last, Part y) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1)),
                                          _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(inside));
}
static inline float reduce_max(Part m) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
static inline float reduce_add(Part m) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

#else  // ------------------------------------------------------------------------------- plain C++

using Part = float;

static inline Part splat(float x) {
  return x;
}
template <class T>
static inline Part load(const T* p) {
  return to_float(*p);
}
template <class T>
static inline void store(T* p, Part x) {
  put(p, x);
}
static inline Part fma(Part a, Part b, Part c) {
  return a * b + c;
}
static inline Part max(Part a, Part b) {
  return a > b ? a : b;
}
static inline Part min(Part a, Part b) {
  return a < b ? a : b;
}
static inline Part zero_where_below(Part e, Part x, Part floor) {
  return x < floor ? 0.0f : e;
}
static inline bool any_above(Part a, Part b) {
  return a > b;
}
// Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
static inline Part rounded(Part x) {
  return (x + 0x1.8p23f) - 0x1.8p23f;
}
static inline Part times_power(Part p, Part n) {
  return p * from_bits((to_bits(n + 0x1.8p23f) + 127u) << 23);
}
static inline Part copy_sign(Part x, Part s) {
  return __builtin_copysignf(x, s);
}
static inline Part keep_lanes(Part x, int first, int last, Part y) {
  return first < 1 && last > 0 ? x : y;
}
static inline float reduce_max(Part a) {
  return a;
}
static inline float reduce_add(Part a) {
  return a;
}

#endif

// 1 + r P(r), that is 2^r for |r| <= 1/2.
static inline Part exp2_of_fraction(Part r) {
  Part p = splat(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, splat(kExp2[i]));
  return fma(p, r, splat(1.0f));
}

static inline Part exp2_of_product(Part x, TwoFloats c, Part shift) {
#if QUIETSTAR_ISA_LEVEL > 0
  const Part hi = splat(c.hi), n = rounded(x * hi);
  const Part r = fma(x, splat(c.lo), fms(x, hi, n));
  return times_power(exp2_of_fraction(r), n - shift);
#else
  // Without a fused multiply-add the product is formed in double. Adding 1.5 * 2^52 rounds to an
  // integer and leaves that integer in the low bits, for any |x * c| < 2^31.
  const double y = x * (static_cast<double>(c.hi) + static_cast<double>(c.lo));
  const double n = (y + 0x1.8p52) - 0x1.8p52;
  const double exponent = (n - static_cast<double>(shift)) + 0x1.8p52;
  std::uint64_t bits;
  std::memcpy(&bits, &exponent, sizeof bits);
  return exp2_of_fraction(static_cast<float>(y - n)) *
         from_bits((static_cast<std::uint32_t>(bits) + 127u) << 23);
#endif
}

static inline Part exp2_or_zero(Part x) {
  const Part n = rounded(x);
  return zero_where_below(times_power(exp2_of_fraction(x - n), n), x, splat(-126.0f));
}

// tanh to a few units in the last place: with E = e^(2|y|) - 1, of which the power of two is kept
// apart, so that it is exact near 0, tanh|y| = E / (E + 2).
static inline Part tanh_of(Part y) {
  constexpr float kTwoLog2E = 2.885390082f;
  const Part z = min(splat(40.0f), copy_sign(y, splat(0.0f)) * splat(kTwoLog2E));
  const Part n = rounded(z), r = z - n, s = times_power(splat(1.0f), n);
  Part p = splat(kExp2[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, splat(kExp2[i]));
  const Part e = fma(s, p * r, s - splat(1.0f));
  return copy_sign(e / (e + splat(2.0f)), y);
}

}  // namespace quietstar::QUIETSTAR_ISA
