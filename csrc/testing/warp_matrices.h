// The warp-wide matrix operations of csrc/cuda/arch.cuh on the CPU: the last lane to arrive gathers
// the fragments of all, multiplies, and scatters the result.
#pragma once

namespace quietstar::cuda {

struct MmaLane {
  float* d;
  const unsigned* a;
  const unsigned* b;
};

template <class T>
float half_of(unsigned bits, int upper) {
  return to_float(T{static_cast<std::uint16_t>(upper ? bits >> 16 : bits)});
}

template <class T>
void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  MmaLane mine{d, a, b};
  testing::warp_operation(
      QUIETSTAR_HERE, kAllLanes, &mine, [](testing::Place, unsigned, void* const* lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& from = *static_cast<const MmaLane*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) {
              left[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_of<T>(from.a[i], half);
            }
            for (int i = 0; i < 2; ++i)
              right[2 * t + i * 8 + half][g] = half_of<T>(from.b[i], half);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          float* to = static_cast<const MmaLane*>(lanes[lane])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
            to[i] += sum;
          }
        }
      });
}

inline float tf32_value(unsigned bits) {
  return __uint_as_float(bits & 0xffffe000u);
}

inline void mma_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  MmaLane mine{d, a, b};
  testing::warp_operation(QUIETSTAR_HERE, kAllLanes, &mine,
                          [](testing::Place, unsigned, void* const* lanes) {
                            float left[16][8], right[8][8];
                            for (int lane = 0; lane < 32; ++lane) {
                              const auto& from = *static_cast<const MmaLane*>(lanes[lane]);
                              const int g = lane / 4, t = lane % 4;
                              for (int i = 0; i < 4; ++i)
                                left[g + i % 2 * 8][t + i / 2 * 4] = tf32_value(from.a[i]);
                              for (int i = 0; i < 2; ++i)
                                right[t + i * 4][g] = tf32_value(from.b[i]);
                            }
                            for (int lane = 0; lane < 32; ++lane) {
                              float* to = static_cast<const MmaLane*>(lanes[lane])->d;
                              for (int i = 0; i < 4; ++i) {
                                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                                float sum = 0;
                                for (int k = 0; k < 8; ++k) sum += left[row][k] * right[k][column];
                                to[i] += sum;
                              }
                            }
                          });
}

inline unsigned to_tf32(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x || std::isinf(x)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;  // to the nearest, ties away from zero
}

struct LoadLane {
  unsigned* to;
  const void* row;
};

template <bool transposed>
void load_matrices_as(testing::Place place, unsigned (&r)[4], const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    testing::fail(place, "ldmatrix: unaligned row");
  LoadLane mine{r, row};
  testing::warp_operation(
      place, kAllLanes, &mine, [](testing::Place, unsigned, void* const* lanes) {
        std::uint16_t matrix[4][8][8];
        for (int lane = 0; lane < 32; ++lane) {
          std::memcpy(matrix[lane / 8][lane % 8], static_cast<LoadLane*>(lanes[lane])->row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2;
            const unsigned low = transposed ? matrix[i][column][row] : matrix[i][row][column];
            const unsigned high =
                transposed ? matrix[i][column + 1][row] : matrix[i][row][column + 1];
            static_cast<LoadLane*>(lanes[lane])->to[i] = low | high << 16;
          }
        }
      });
}
inline void load_matrices(unsigned (&r)[4], const void* row) {
  load_matrices_as<false>(QUIETSTAR_HERE, r, row);
}
inline void load_matrices_t(unsigned (&r)[4], const void* row) {
  load_matrices_as<true>(QUIETSTAR_HERE, r, row);
}

}  // namespace quietstar::cuda
