#include <map>
#include <memory>

#include "faults.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace quietstar::testing {
namespace {

using namespace quietstar::cuda;
constexpr int kThreads = 64;

// out[i] = 63 - i by way of shared memory. The mistake: no barrier between writing and reading.
__global__ void deleted_barrier(float* out, bool sound) {
  QUIETSTAR_SHARED(float, row, [kThreads]);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (sound) __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

// out[i] = i, then i + 1 by way of the same array. The mistake: no barrier before it is used again.
__global__ void deleted_second_barrier(float* out, bool sound) {
  QUIETSTAR_SHARED(float, row, [kThreads]);
  const unsigned other = kThreads - 1 - threadIdx.x;
  row[other] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float first = row[threadIdx.x];
  if (sound) __syncthreads();
  row[other] = first;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

// The mistake: only one warp goes to the barrier.
__global__ void divergent_barrier(float* out, bool sound) {
  if (sound || threadIdx.x < 32) {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

// The mistake: both warps meet, at different barriers.
__global__ void two_barriers(float* out, bool sound) {
  if (sound || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

// The sum of a warp. The mistake: half of the lanes do not take part.
__global__ void missing_lanes(float* out, bool sound) {
  float sum = 1;
  if (sound || threadIdx.x % 32 < 16) {
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  out[threadIdx.x] = sum;
}

// The mistake: the mask names the lower half of the lanes only, and they read from the upper half.
__global__ void wrong_mask(float* out, bool sound) {
  float sum = 1;
  if (sound) {
    sum += __shfl_xor_sync(kAllLanes, sum, 16);
  } else if (threadIdx.x % 32 < 16) {
    sum += __shfl_xor_sync(0x0000ffffu, sum, 16);
  }
  out[threadIdx.x] = sum;
}

// The mistake: one element past the end of dynamic shared memory.
__global__ void store_past_shared(float* out, bool sound) {
  QUIETSTAR_DYNAMIC_SHARED(memory);
  auto* row = reinterpret_cast<float*>(memory);
  row[threadIdx.x + (sound ? 0 : 1)] = 1;
  __syncthreads();
  out[threadIdx.x] = 1;
}

// The mistake: one element past the end of the output.
__global__ void store_past_global(float* out, bool sound) {
  out[threadIdx.x + (sound ? 0 : 1)] = 1;
}

// The mistake: an asynchronous copy is read before it is waited for.
__global__ void early_read(float* out, bool sound) {
  QUIETSTAR_SHARED(Pack<float>, pack, [kThreads]);
  copy16_async(&pack[threadIdx.x], out + threadIdx.x / 4 * 4);
  commit_copies();
  if (sound) wait_for_copies<0>();
  const float value = pack[threadIdx.x].at[threadIdx.x % 4];
  wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = value;
}

// out[i] = 63, the mean of out[i] + out[63 - i]. The mistake: a warp puts its sum where copies of
// the other warp may still arrive, as it has waited for its own only.
__global__ void late_copy(float* out, bool sound) {
  QUIETSTAR_SHARED(Pack<float>, pack, [kThreads]);
  const unsigned other = kThreads - 1 - threadIdx.x;
  copy16_async(&pack[other], out + other / 4 * 4);
  commit_copies();
  wait_for_copies<0>();
  if (sound) __syncthreads();
  const float sum = warp_reduce(out[threadIdx.x] + out[other], Sum());
  pack[threadIdx.x].at[threadIdx.x % 4] = sum;
  const float count = warp_reduce(1.0f, Sum());
  const unsigned neighbour = threadIdx.x ^ 1;
  const float value = pack[neighbour].at[neighbour % 4] / count;
  __syncthreads();
  out[threadIdx.x] = value;
}

// The mistake: threads take their places in the order in which they arrive.
__global__ void order_of_arrival(float* out, bool sound) {
  QUIETSTAR_SHARED(int, next, [1]);
  if (threadIdx.x == 0) next[0] = 0;
  __syncthreads();
  const int place = atomicAdd(&next[0], 1);
  out[sound ? static_cast<int>(threadIdx.x) : place] = static_cast<float>(threadIdx.x);
}

using Kernel = void (*)(float*, bool);
const std::map<std::string, Kernel>& faults() {
  static const std::map<std::string, Kernel> all{
      {"deleted_barrier", deleted_barrier},
      {"deleted_second_barrier", deleted_second_barrier},
      {"divergent_barrier", divergent_barrier},
      {"two_barriers", two_barriers},
      {"missing_lanes", missing_lanes},
      {"wrong_mask", wrong_mask},
      {"store_past_shared", store_past_shared},
      {"store_past_global", store_past_global},
      {"early_read", early_read},
      {"late_copy", late_copy},
      {"order_of_arrival", order_of_arrival},
  };
  return all;
}

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : faults()) names.push_back(name);
  return names;
}

std::vector<float> run_fault(const std::string& name, bool sound) {
  const auto found = faults().find(name);
  if (found == faults().end()) throw std::invalid_argument("no fault is called '" + name + "'");
  const std::unique_ptr<float[]> out(new float[kThreads]);  // exact, for the address sanitizer
  for (int i = 0; i < kThreads; ++i) out[i] = static_cast<float>(i);
  launch(name.c_str(), Device{0, 0}, found->second, dim3(1), dim3(kThreads),
         sizeof(float) * kThreads, out.get(), sound);
  return {out.get(), out.get() + kThreads};
}

}  // namespace quietstar::testing
