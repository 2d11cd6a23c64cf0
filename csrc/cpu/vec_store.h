// Division, stores to sixteen-bit floats and parts of vectors, on top of vec.h; from *_kernel.cpp
// files only.
#pragma once

#include "vec.h"

namespace quietstar::QUIETSTAR_ISA {

static inline BFloat16 to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// To nearest, ties to even, as every store here.
static inline Float16 to_float16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (size >= 0x38800000u) {  // normal
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded
    const float moved = from_bits(size) + 0.5f;
    std::uint32_t low;
    std::memcpy(&low, &moved, sizeof low);
    half = low - 0x3f000000u;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

static inline void put(float* p, float x) {
  *p = x;
}
static inline void put(BFloat16* p, float x) {
  *p = to_bfloat16(x);
}
static inline void put(Float16* p, float x) {
  *p = to_float16(x);
}

static inline void store(float* p, Vec x) {
  x.store(p);
}

#if QUIETSTAR_ISA_LEVEL == 2

static inline Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
static inline void store(BFloat16* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), bits,
                            _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
static inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif QUIETSTAR_ISA_LEVEL == 1

static inline Vec operator/(Vec x, Vec y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
static inline __m256i upper_half(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
static inline void store(BFloat16* p, Vec x) {
  const __m256i both = _mm256_packus_epi32(upper_half(x.a), upper_half(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}
static inline void store(Float16* p, Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, kNearest));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, kNearest));
}

#else

static inline Vec operator/(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[i] / b.v[i];
  return r;
}
template <class T>
static inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) put(p + i, x.v[i]);
}

#endif

// The first count (1 to kLanes) elements; the other lanes are 0, and memory there is not touched.
template <class T>
static inline Vec load_part(const T* p, std::int64_t count) {
  if (count == kLanes) return Vec::load(p);
  T lanes[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Vec::load(lanes);
}
template <class T>
static inline void store_part(T* p, Vec x, std::int64_t count) {
  if (count == kLanes) {
    store(p, x);
    return;
  }
  T lanes[kLanes];
  store(lanes, x);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

}  // namespace quietstar::QUIETSTAR_ISA
