// Where a CUDA kernel runs, and whether it can.
#pragma once

#include <array>
#include <cstdint>

namespace quietstar::cuda {

struct Device {
  int index;              // number of the device whose memory the pointers belong to
  std::uintptr_t stream;  // a cudaStream_t of that device; 0 is its default stream
};

// CUDA's versions as CUDA numbers them, 13000 for 13.0: the newest that the driver supports, and
// the one that the kernels were built with.
std::array<int, 2> versions();

}  // namespace quietstar::cuda
