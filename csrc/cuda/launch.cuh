// Launching kernels, checked, on the device and stream that the caller names, and without waiting
// for them; so a call can be captured in a CUDA graph.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "arch.cuh"
#include "quietstar/device.h"

namespace quietstar::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "current device");
    if (device != before_) check(cudaSetDevice(device), "choosing the device");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
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
inline std::size_t most_shared_memory(const Device& device) {
  return static_cast<std::size_t>(
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
}

// Runs kernel<<<grid, block, shared_bytes>>>(args...); a grid without blocks runs nothing. Throws
// std::runtime_error where the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Device& device, void (*kernel)(Parameters...), dim3 grid,
            dim3 block, std::size_t shared_bytes, Arguments... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const DeviceGuard guard(device.index);
  if (shared_bytes > 48 * 1024) {
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
