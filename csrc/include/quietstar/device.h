// Where a CUDA kernel runs.
#pragma once

#include <cstdint>

namespace quietstar::cuda {

struct Device {
  int index;              // number of the device whose memory the pointers belong to
  std::uintptr_t stream;  // a cudaStream_t of that device; 0 is its default stream
};

}  // namespace quietstar::cuda
