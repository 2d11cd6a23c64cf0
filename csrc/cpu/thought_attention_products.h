// Products of small matrices with the sums held in registers, for the attention kernels. For
// *_kernel.cpp files only, like vec.h.
#pragma once

#include "vec_rows.h"

namespace quietstar::QUIETSTAR_ISA {

// ---- small products: c[i][j] (+)= sum over k of a(i, k) b[k][j], in float

// Register tiles, rows x vectors of 16: what fills the registers and leaves room for operands. With
// few rows (generation) the tile is wider, as each sum in it waits for its last addition.
#if QUIETSTAR_ISA_LEVEL == 2
constexpr int kTileRows = 12, kTileRowsTransposed = 8, kTileVecs = 2, kFewRows = 4, kFewVecs = 4;
#elif QUIETSTAR_ISA_LEVEL == 1
constexpr int kTileRows = 6, kTileRowsTransposed = 4, kTileVecs = 1, kFewRows = 2, kFewVecs = 2;
#else
constexpr int kTileRows = 2, kTileRowsTransposed = 2, kTileVecs = 1, kFewRows = 1, kFewVecs = 1;
#endif

// b[k][j] is b[k * step + (j / 16) * vec + j % 16]: panels have vec = panel size and step 16, plain
// rows have vec 16 and step = row length.
struct Operand {
  const float* data;
  std::int64_t step, vec;
};

template <int kRows, int kVecs, bool kTransposed>
static inline void product_tile(std::int64_t depth, const float* a, std::int64_t a_stride,
                                const Operand& b, float* c, std::int64_t c_stride, bool add) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      sum[i][j] = add ? Vec::load(c + i * c_stride + j * kLanes) : Vec::fill(0.0f);
    }
  }
  // Three rows share a pointer (offsets 0, 1, 2 strides), so that the pointers fit in registers.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* row[kPointers];
  for (int i = 0; i < kPointers; ++i) row[i] = a + 3 * i * a_stride;
  const float* from = b.data;
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec value[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) value[j] = Vec::load(from + j * b.vec);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = Vec::fill(kTransposed ? a[i] : row[i / 3][(i % 3) * a_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(factor, value[j], sum[i][j]);
    }
    from += b.step;
    if (kTransposed) {
      a += a_stride;
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kPointers; ++i) ++row[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[i][j].store(c + i * c_stride + j * kLanes);
  }
}

template <int kVecs, bool kTransposed, int kRows>
static inline void product_rows(std::int64_t rows, std::int64_t depth, const float* a,
                                std::int64_t a_stride, const Operand& b, float* c,
                                std::int64_t c_stride, bool add) {
  const std::int64_t a_row = kTransposed ? 1 : a_stride;
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_stride) {
    product_tile<kRows, kVecs, kTransposed>(depth, a, a_stride, b, c, c_stride, add);
  }
  if constexpr (kRows > 1) {
    constexpr int kLess = kRows == 12 ? 8 : kRows == 6 ? 4 : kRows / 2;
    if (rows > 0) {
      product_rows<kVecs, kTransposed, kLess>(rows, depth, a, a_stride, b, c, c_stride, add);
    }
  }
}

// a(i, k) is a[i * a_stride + k], or a[k * a_stride + i] where transposed. columns is a multiple of
// 16.
template <bool kTransposed>
static inline void product(std::int64_t rows, std::int64_t columns, std::int64_t depth,
                           const float* a, std::int64_t a_stride, Operand b, float* c,
                           std::int64_t c_stride, bool add) {
  constexpr int kRows = kTransposed ? kTileRowsTransposed : kTileRows;
  std::int64_t j = 0;
  if (!kTransposed && rows <= kFewRows) {
    for (; j + kFewVecs * kLanes <= columns; j += kFewVecs * kLanes) {
      product_rows<kFewVecs, false, kFewRows>(rows, depth, a, a_stride, b, c + j, c_stride, add);
      b.data += kFewVecs * b.vec;
    }
  }
  for (; j + kTileVecs * kLanes <= columns; j += kTileVecs * kLanes) {
    product_rows<kTileVecs, kTransposed, kRows>(rows, depth, a, a_stride, b, c + j, c_stride, add);
    b.data += kTileVecs * b.vec;
  }
  for (; j < columns; j += kLanes) {
    product_rows<1, kTransposed, kRows>(rows, depth, a, a_stride, b, c + j, c_stride, add);
    b.data += b.vec;
  }
}

// ---- for few rows, where packing keys costs more than the product: keys as they lie in memory

#if QUIETSTAR_ISA_LEVEL == 2
constexpr int kDotKeys = 16;
#else
constexpr int kDotKeys = 4;
#endif

// to[i] = sum of the lanes of sums[i]
static inline void store_sums(const Vec* sums, float* to) {
#if QUIETSTAR_ISA_LEVEL == 2
  const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
  __m512 pairs[8], quads[4];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = sums[2 * i].part[0], b = sums[2 * i + 1].part[0];
    pairs[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto fold = [&](__m512 a, __m512 b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  _mm512_storeu_ps(to, fold(fold(quads[0], quads[1]), fold(quads[2], quads[3])));
#else
  for (int i = 0; i < kDotKeys; ++i) to[i] = reduce_add(sums[i]);
#endif
}

// scores[i][j] = row i of a . key j for j < keys, with rows of a padded by zeros to a multiple of
// 16; 0 for other j below columns, a multiple of 16.
template <class T>
static inline void dot_products(std::int64_t rows, std::int64_t keys, std::int64_t columns,
                                std::int64_t size, const float* a, std::int64_t a_stride,
                                const T* from, std::int64_t stride, float* scores,
                                std::int64_t score_stride) {
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t j = 0; j < columns; j += kDotKeys) {
    for (std::int64_t i = 0; i < rows; ++i) {
      Vec sums[kDotKeys];
      for (int n = 0; n < kDotKeys; ++n) sums[n] = Vec::fill(0);
      const float* row = a + i * a_stride;
      const T* key = from + j * stride;
      if (j + kDotKeys <= keys) {
        for (std::int64_t d = 0; d < whole; d += kLanes) {
          const Vec q = Vec::load(row + d);
#pragma GCC unroll 16
          for (int n = 0; n < kDotKeys; ++n) {
            sums[n] = fma(q, Vec::load(key + n * stride + d), sums[n]);
          }
        }
      }
      const std::int64_t left = j + kDotKeys <= keys ? whole : 0;
      for (std::int64_t d = left; d < size; d += kLanes) {
        const Vec q = Vec::load(row + d);
        for (int n = 0; n < kDotKeys && j + n < keys; ++n) {
          sums[n] = fma(q, load_part(key + n * stride + d, size - d), sums[n]);
        }
      }
      store_sums(sums, scores + i * score_stride + j);
    }
  }
}

}  // namespace quietstar::QUIETSTAR_ISA
