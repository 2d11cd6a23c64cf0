# The target cuda_on_cpu: every csrc/cuda/*.cu and instance compiled by the host's C++ compiler against
# csrc/testing, as the Python module _cuda_on_cpu. Not part of the package; tests build it:
#   cmake -S . -B build/cuda_on_cpu -DQUIETSTAR_CUDA=off [-DQUIETSTAR_SANITIZE=ON]
#   cmake --build build/cuda_on_cpu --target cuda_on_cpu
# Only where QUIETSTAR_CUDA=off: the language of a source file is that of all targets.
if(TARGET kernels_cuda)
  return()
endif()
option(QUIETSTAR_SANITIZE "Build cuda_on_cpu with the address and undefined-behaviour sanitizers" OFF)

file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/testing/*.cu)
list(APPEND sources ${cuda_instances})
set_source_files_properties(${sources} PROPERTIES LANGUAGE CXX)
pybind11_add_module(cuda_on_cpu NO_EXTRAS EXCLUDE_FROM_ALL csrc/testing/module.cpp
                    csrc/testing/fibers.cpp csrc/testing/operations.cpp csrc/bindings_cuda.cpp
                    ${sources})
set_target_properties(cuda_on_cpu PROPERTIES OUTPUT_NAME _cuda_on_cpu)
target_include_directories(cuda_on_cpu PRIVATE csrc csrc/include csrc/cuda csrc/testing)
target_compile_options(cuda_on_cpu PRIVATE -g1 -Wno-unknown-pragmas)
# nvcc makes one fma of a product and a sum. So does this compiler, where the processor can, and a
# kernel that relies on the product's rounding fails here, too.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  include(CheckCXXSourceRuns)
  check_cxx_source_runs("int main() { return __builtin_cpu_supports(\"fma\") ? 0 : 1; }"
                        QUIETSTAR_TESTS_HAVE_FMA)
  if(QUIETSTAR_TESTS_HAVE_FMA)
    target_compile_options(cuda_on_cpu PRIVATE -mfma)
  endif()
endif()
target_compile_options(cuda_on_cpu PRIVATE -ffp-contract=fast)
if(QUIETSTAR_SANITIZE)
  target_compile_options(cuda_on_cpu PRIVATE -O1 -fsanitize=address,undefined
                         -fno-sanitize-recover=undefined)
  target_link_options(cuda_on_cpu PRIVATE -fsanitize=address,undefined)
endif()
