#include <stdexcept>

#include "launch.cuh"
#include "primitives.h"
#include "reduce.cuh"

namespace quietstar::testing {
namespace {

using namespace quietstar::cuda;

template <class T>
__global__ void matrix_product(const float* a, const float* b, float* out) {
  QUIETSTAR_SHARED(Pack<T>, rows_a, [16 * 2]);
  QUIETSTAR_SHARED(Pack<T>, rows_b, [16]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) rows_a[i / 8].at[i % 8] = from_float<T>(a[i]);
  for (int i = lane; i < 128; i += 32) rows_b[i / 8].at[i % 8] = from_float<T>(b[i]);
  __syncwarp();
  unsigned fragment_a[4], fragment_b[4];
  // Matrices of A: rows 0-7 and 8-15 of the left half, then of the right half.
  load_matrices(fragment_a, &rows_a[lane % 16 * 2 + lane / 16]);
  // The upper two of these four matrices are not used.
  load_matrices_t(fragment_b, &rows_b[lane % 16]);
  float d[4] = {};
  mma_16x8x16<T>(d, fragment_a, {fragment_b[0], fragment_b[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

__global__ void matrix_product_tf32(const float* a, const float* b, float* out) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  unsigned fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) fragment_a[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fragment_b[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  float d[4] = {};
  mma_16x8x8_tf32(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

__global__ void warp(const float* in, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const float x = in[lane];
  out[lane] = warp_reduce(x, Sum());
  out[32 + lane] = warp_reduce(x, Largest());
  out[64 + lane] = __shfl_sync(kAllLanes, x, (lane + 1) % 32);
  out[96 + lane] = __shfl_xor_sync(kAllLanes, x, 1);
  float group = x;
  for (int step = 4; step > 0; step /= 2) group += __shfl_xor_sync(kAllLanes, group, step, 8);
  out[128 + lane] = group;
  out[160 + lane] = __shfl_down_sync(kAllLanes, x, 3);
  out[192 + lane] = __shfl_up_sync(kAllLanes, x, 3);
  out[224 + lane] = static_cast<float>(__ballot_sync(kAllLanes, x > 0) >> lane & 1);
}

__global__ void block(const float* in, float* out) {
  QUIETSTAR_SHARED(float, scratch, [3]);
  const float x = in[threadIdx.x];
  out[threadIdx.x] = block_reduce<96>(x, scratch, Sum());
  out[96 + threadIdx.x] = static_cast<float>(__syncthreads_count(x > 0));
}

__global__ void copies(const float* in, int valid, float* out) {
  QUIETSTAR_SHARED(Pack<float>, memory, [16]);
  const int thread = static_cast<int>(threadIdx.x);  // 8 of them, two packs each
  for (int group = 0; group < 2; ++group) {
    const int first = (group * 8 + thread) * 4;
    copy16_async(&memory[group * 8 + thread], in + (first < valid ? first : 0), first < valid);
    commit_copies();
  }
  wait_for_copies<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[thread * 4 + i] = memory[thread].at[i];
  wait_for_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[32 + thread * 4 + i] = memory[8 + thread].at[i];
}

template <class T>
__global__ void rounding(const float* in, float* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) {
    out[i] = to_float(from_float<T>(in[i]));
    const unsigned pair = pack2<T>(in[i / 2 * 2], in[i / 2 * 2 + 1]);
    out[count + i] = to_float(T{static_cast<std::uint16_t>(i % 2 ? pair >> 16 : pair & 0xffff)});
  }
}

__global__ void shared_memory(int floats, float* out) {
  QUIETSTAR_DYNAMIC_SHARED(memory);
  QUIETSTAR_SHARED(float, beside, [256]);
  auto* const row = reinterpret_cast<float*>(memory);
  if (threadIdx.x == 1) beside[255] = 1;
  row[threadIdx.x == 0 ? 0 : floats - 1] = 1;
  __syncthreads();
  if (threadIdx.x == 0) *out = (row[0] + row[floats - 1]) * beside[255];
}

void require(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}

}  // namespace

std::vector<float> run_matrix_product(const std::string& type, const std::vector<float>& a,
                                      const std::vector<float>& b) {
  const std::size_t depth = type == "tf32" ? 8 : 16;
  require(type == "tf32" || type == "bf16" || type == "f16", "type is bf16, f16 or tf32");
  require(a.size() == 16 * depth && b.size() == depth * 8, "a or b has the wrong size");
  const auto kernel = type == "tf32"   ? matrix_product_tf32
                      : type == "bf16" ? matrix_product<BFloat16>
                                       : matrix_product<Float16>;
  std::vector<float> out(128, NAN);
  launch("matrix_product", Device{0, 0}, kernel, dim3(1), dim3(32), 0, a.data(), b.data(),
         out.data());
  return out;
}

std::vector<float> run_warp(const std::vector<float>& values) {
  require(values.size() == 32, "expected 32 values");
  std::vector<float> out(256, NAN);
  launch("warp", Device{0, 0}, warp, dim3(1), dim3(32), 0, values.data(), out.data());
  return out;
}

std::vector<float> run_block(const std::vector<float>& values) {
  require(values.size() == 96, "expected 96 values");
  std::vector<float> out(192, NAN);
  launch("block", Device{0, 0}, block, dim3(1), dim3(96), 0, values.data(), out.data());
  return out;
}

std::vector<float> run_copies(const std::vector<float>& values, int valid) {
  require(values.size() == 64 && valid % 4 == 0, "expected 64 values, valid ones in fours");
  std::vector<float> out(64, NAN);
  launch("copies", Device{0, 0}, copies, dim3(1), dim3(8), 0, values.data(), valid, out.data());
  return out;
}

std::vector<float> run_rounding(const std::string& type, const std::vector<float>& values) {
  require(type == "bf16" || type == "f16", "type is bf16 or f16");
  require(values.size() % 2 == 0, "expected pairs");
  std::vector<float> out(2 * values.size(), NAN);
  launch("rounding", Device{0, 0}, type == "bf16" ? rounding<BFloat16> : rounding<Float16>, dim3(1),
         dim3(32), 0, values.data(), out.data(), static_cast<int>(values.size()));
  return out;
}

float run_shared_memory(int floats) {
  require(floats > 0, "expected one number or more");
  float out = NAN;
  launch("shared_memory", Device{0, 0}, shared_memory, dim3(1), dim3(2), sizeof(float) * floats,
         floats, &out);
  return out;
}

}  // namespace quietstar::testing
