// The CUDA half of the Python module: like bindings.cpp, with the device's number and the stream as
// the last two arguments of every function. Compiled on its own, so that csrc/testing can put the
// same functions in front of kernels that run on the CPU.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>

#include "quietstar/device.h"
#include "quietstar/types.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_cuda(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  (void)release;
  bind_cuda_attention(m);
}
