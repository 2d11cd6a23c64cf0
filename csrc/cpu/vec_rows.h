// Rows of any length and their transposition, on top of vec.h; from *_kernel.cpp files only.
#pragma once

#include "vec.h"

namespace quietstar::QUIETSTAR_ISA {

// The first count (at least 1) elements, up to kLanes; the other lanes are 0, and memory there is
// not touched.
template <class T>
static inline Vec load_part(const T* p, std::int64_t count) {
  if (count >= kLanes) return Vec::load(p);
  T lanes[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Vec::load(lanes);
}
template <class T>
static inline void store_part(T* p, Vec x, std::int64_t count) {
  if (count >= kLanes) {
    store(p, x);
    return;
  }
  T lanes[kLanes];
  store(lanes, x);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// row[0, padded) = from[0, size) * factor, then zeros
template <class T>
static inline void load_row(const T* from, std::int64_t size, std::int64_t padded, float factor,
                            float* row) {
  const Vec f = Vec::fill(factor);
  for (std::int64_t d = 0; d < padded; d += kLanes) {
    (load_part(from + d, size - d) * f).store(row + d);
  }
}

// to[0, size) = row[0, size) * factor; row is padded to a whole number of vectors.
template <class T>
static inline void store_row(const float* row, std::int64_t size, float factor, T* to) {
  const Vec f = Vec::fill(factor);
  for (std::int64_t d = 0; d < size; d += kLanes) {
    store_part(to + d, Vec::load(row + d) * f, size - d);
  }
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
      r[i] = i < rows ? load_part(from + i * stride + d0, count).part[0] : _mm512_setzero_ps();
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
