// Launching kernels, checked, on the device and stream that the caller names, and without waiting
// for them; so a call can be captured in a CUDA graph.
#pragma once

#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>

#include "arch.cuh"
#include "quietstar/device.h"

namespace quietstar::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch, which may well succeed, would be blamed for it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether a device has a context; cudaSetDevice would make one, some 400 MB of its memory.
inline bool has_context(int device) {
  using State = int (*)(int device, unsigned* flags, int* active);
  static const State state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 7000,
                                           cudaEnableDefault, &found),
          "asking the driver for a function");
    return reinterpret_cast<State>(function);
  }();
  unsigned flags = 0;
  int active = 0;
  return state != nullptr && state(device, &flags, &active) == 0 && active != 0;
}

// Makes a device current for as long as it lives. Where the one before has no context, as for a
// thread whose tensors are all on another, this one stays: going back would make it one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "current device");
    if (device == before_) return;
    goes_back_ = has_context(before_);
    check(cudaSetDevice(device), "choosing the device");
  }
  ~DeviceGuard() {
    if (goes_back_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool goes_back_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "reading a device attribute");
  return value;
}

inline int multiprocessors(const Device& device) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device.index);
}

// Bytes of shared memory that a block may have.
inline std::size_t max_shared_memory(const Device& device) {
  return static_cast<std::size_t>(
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// So many blocks that each takes `each` of the work.
inline dim3 blocks(std::int64_t work, std::int64_t each = 1) {
  return dim3(static_cast<unsigned>(ceil_div(work, each)));
}

inline int bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// A kernel whose blocks share more than 48 KiB, static arrays included, has to opt in. It does from
// so much dynamic memory on; the static arrays are smaller than the difference.
constexpr std::size_t kOptsInFrom = 32 * 1024;
inline std::mutex opt_in_mutex;

// Runs kernel<<<grid, block, shared_bytes>>>(args...); a grid without blocks runs nothing. Throws
// std::runtime_error where the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Device& device, void (*kernel)(Parameters...), dim3 grid,
            dim3 block, std::size_t shared_bytes, Arguments... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const DeviceGuard guard(device.index);
  std::unique_lock<std::mutex> alone;
  if (shared_bytes > kOptsInFrom) {
    // The size is the kernel's, not the launch's: another thread must not set a smaller one
    // between.
    alone = std::unique_lock<std::mutex>(opt_in_mutex);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(device.stream)>>>(
      static_cast<Parameters>(args)...);
#else
  testing::launch_kernel(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                         [=] { kernel(static_cast<Parameters>(args)...); });
#endif
  check(cudaGetLastError(), name);
}

}  // namespace quietstar::cuda
