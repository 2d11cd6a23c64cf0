// The calls of CUDA's runtime that csrc/cuda/launch.cuh makes, with the names, the numbers and the
// memory of the real ones: an error stays the thread's last one until cudaGetLastError takes it, a
// block has 48 KiB of shared memory until its kernel asks for more, and choosing a device gives it
// a context. Included by cuda_on_cpu.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1,
};
constexpr int cudaEnableDefault = 0;

cudaError_t cudaGetLastError();
// Of a launch, what the last one that was refused asked for.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);

namespace quietstar::testing {

constexpr int kDevices = 2;
constexpr int kMultiprocessors = 3;
// What a block may have on an A100, and the default here; on an RTX 4090 it is 99 KiB.
constexpr std::size_t kSharedMemoryLimit = 163 * 1024;

// For tests. Launches since the library was loaded, and how to make the one after the next `skip`
// fail, once.
std::int64_t launches();
void fail_launch(int skip);
// Bytes of shared memory that a block can ask for, at least 48 KiB.
void set_shared_memory_limit(std::size_t bytes);
// Takes the contexts of all devices away and makes device 0 current.
void reset_devices();
bool has_context(int device);
int current_device();

cudaError_t set_shared_memory(const void* function, cudaFuncAttribute attribute, int bytes);

// kernel<<<grid, block, shared_bytes>>>(...): runs body once per thread. A launch that a device
// would refuse runs nothing and is the last error; what a check finds is thrown.
void launch_kernel(const char* name, const void* function, dim3 grid, dim3 block,
                   std::size_t shared_bytes, const std::function<void()>& body);

}  // namespace quietstar::testing

// Other than on a device, it holds for the next launch alone: none may depend on an earlier one.
template <class Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  return quietstar::testing::set_shared_memory(reinterpret_cast<const void*>(function), attribute,
                                               value);
}
