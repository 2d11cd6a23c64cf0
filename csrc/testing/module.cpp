// The Python module _cuda_on_cpu: the functions of the CUDA half of _native, with its sources
// compiled for the CPU, and the controls of fibers.h. Built by tests only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "cuda_on_cpu.h"
#include "faults.h"
#include "primitives.h"

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "CUDA kernels of quietstar_ext, run on the CPU for tests.";
  bind_cuda(m);
  m.def("set_order", &quietstar::testing::set_order);
  m.def("fail_launch", &quietstar::testing::fail_launch);
  m.def("set_shared_memory_limit", &quietstar::testing::set_shared_memory_limit);
  m.attr("shared_memory_limit") = quietstar::testing::kSharedMemoryLimit;  // before it is set
  m.def("reset_devices", &quietstar::testing::reset_devices);
  m.def("has_context", &quietstar::testing::has_context);
  m.def("current_device", &quietstar::testing::current_device);
  m.def("launches", &quietstar::testing::launches);
  m.def("fault_names", &quietstar::testing::fault_names);
  m.def("run_fault", &quietstar::testing::run_fault);
  m.def("run_matrix_product", &quietstar::testing::run_matrix_product);
  m.def("run_warp", &quietstar::testing::run_warp);
  m.def("run_block", &quietstar::testing::run_block);
  m.def("run_copies", &quietstar::testing::run_copies);
  m.def("run_rounding", &quietstar::testing::run_rounding);
  m.def("run_shared_memory", &quietstar::testing::run_shared_memory);
  m.attr("sanitized") =
#ifdef __SANITIZE_ADDRESS__
      true;
#else
      false;
#endif
}
