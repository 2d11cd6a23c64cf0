#include "launch.cuh"
#include "quietstar/device.h"

namespace quietstar::cuda {

std::array<int, 2> versions() {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "version of the driver");
  check(cudaRuntimeGetVersion(&runtime), "version of the runtime");
  return {driver, runtime};
}

}  // namespace quietstar::cuda
