// What runtime.h declares; the kernels themselves are run by fibers.cpp.
#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda_on_cpu.h"

namespace quietstar::testing {
namespace {

constexpr std::size_t kWithoutAsking = 48 * 1024;

std::size_t limit = kSharedMemoryLimit;
std::array<bool, kDevices> contexts{};
std::map<const void*, std::size_t> asked;  // dynamic shared memory, by kernel
int fail_in = -1;
std::int64_t launched = 0;
// As in CUDA, of each thread.
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string refusal;
thread_local int device_of_thread = 0;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// As cuDevicePrimaryCtxGetState.
int context_state(int device, unsigned* flags, int* active) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  *flags = 0;
  *active = contexts[device];
  return 0;
}

// What is wrong with a launch, empty for nothing.
std::string fault_of(dim3 grid, dim3 block, std::size_t dynamic, std::size_t may) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (fail_in >= 0 && fail_in-- == 0) return "injected launch failure";
  if (threads < 1 || threads > 1024 || block.z > 64) {
    return "invalid launch: " + std::to_string(threads) + " threads";
  }
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535) {
    return "invalid launch: a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
           ", " + std::to_string(grid.z) + ")";
  }
  if (dynamic > may) {
    return "invalid launch: " + std::to_string(dynamic) + " bytes of dynamic shared memory, and " +
           std::to_string(may) + " allowed";
  }
  return "";
}

}  // namespace

std::int64_t launches() {
  return launched;
}
void fail_launch(int skip) {
  fail_in = skip;
}

void set_shared_memory_limit(std::size_t bytes) {
  if (bytes < kWithoutAsking) throw std::invalid_argument("every device has 48 KiB");
  limit = bytes;
}

void reset_devices() {
  contexts.fill(false);
  device_of_thread = 0;
}
bool has_context(int device) {
  return contexts.at(static_cast<std::size_t>(device));
}
int current_device() {
  return device_of_thread;
}

cudaError_t set_shared_memory(const void* function, cudaFuncAttribute attribute, int bytes) {
  const bool fine = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && bytes >= 0 &&
                    static_cast<std::size_t>(bytes) <= limit;
  if (fine) asked[function] = static_cast<std::size_t>(bytes);
  return result(fine ? cudaSuccess : cudaErrorInvalidValue);
}

void launch_kernel(const char* name, const void* function, dim3 grid, dim3 block,
                   std::size_t shared_bytes, const std::function<void()>& body) {
  const auto found = asked.find(function);
  const bool has_asked = found != asked.end();
  const std::size_t dynamic = has_asked ? found->second : kWithoutAsking;
  asked.clear();
  launched += 1;
  contexts[device_of_thread] = true;
  const std::string fault = fault_of(grid, block, shared_bytes, dynamic);
  if (!fault.empty()) {
    refusal = "kernel " + std::string(name) + ": " + fault;
    result(cudaErrorInvalidConfiguration);
    return;
  }
  run_grid(name, grid, block, shared_bytes, has_asked ? limit : kWithoutAsking, body);
}

}  // namespace quietstar::testing

using namespace quietstar::testing;

cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return refusal.c_str();
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "invalid argument";
  }
}
cudaError_t cudaGetDevice(int* device) {
  *device = device_of_thread;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  device_of_thread = device;
  contexts[device] = true;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : static_cast<int>(limit);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13010;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(symbol) == "cuDevicePrimaryCtxGetState";
  *function = known ? reinterpret_cast<void*>(&context_state) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
