#include "launch.cuh"
#include "quietstar/device.h"

namespace quietstar::cuda {

Versions versions() {
  Versions found{};
  check(cudaDriverGetVersion(&found.driver), "version of the driver");
  check(cudaRuntimeGetVersion(&found.runtime), "version of the runtime");
  return found;
}

}  // namespace quietstar::cuda
