# Decides whether csrc/cuda is compiled, and says so in one line.
# QUIETSTAR_CUDA: auto takes CUDA where nvcc is found, on insists on it, off leaves it out.
# Only nvcc is needed, no GPU and no torch; the CUDA runtime is linked statically.

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
string(TOLOWER "${QUIETSTAR_CUDA}" cuda_wanted)
if(NOT cuda_wanted MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "QUIETSTAR_CUDA is '${QUIETSTAR_CUDA}'; expected auto, on or off")
endif()

find_program(QUIETSTAR_NVCC nvcc
             HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)

set(cuda_missing "")
if(cuda_wanted STREQUAL "off")
  set(cuda_missing "QUIETSTAR_CUDA=off")
elseif(NOT QUIETSTAR_NVCC)
  set(cuda_missing "nvcc was not found")
elseif(NOT cuda_sources)
  set(cuda_missing "csrc/cuda has no kernels yet")
endif()

if(cuda_missing)
  if(cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "QUIETSTAR_CUDA=on, but ${cuda_missing}. Install the CUDA toolkit or set "
                        "CUDA_HOME, or build for the CPU with QUIETSTAR_CUDA=off.")
  endif()
  message(STATUS "quietstar: CPU build (${cuda_missing})")
  return()
endif()

set(archs "${QUIETSTAR_CUDA_ARCHS}")
if(NOT archs)
  set(archs "sm_80,sm_90,sm_100")
endif()
string(REGEX REPLACE "[ ,;]+" ";" archs "${archs}")
list(TRANSFORM archs REPLACE "^sm_" "")
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch IN LISTS archs)
  if(NOT arch MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "QUIETSTAR_CUDA_ARCHS has '${arch}'; expected names like sm_90")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${arch}-real")
endforeach()
# PTX of the last one lets newer devices compile the kernels for themselves.
list(GET archs -1 newest)
if(newest MATCHES "^[0-9]+$")
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
endif()

set(CMAKE_CUDA_COMPILER "${QUIETSTAR_NVCC}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -Xptxas -v")  # scripts/compile_check.py reads the report
enable_language(CUDA)
list(JOIN archs ", sm_" shown)
message(STATUS "quietstar: CPU and CUDA build (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, sm_${shown})")

add_library(kernels_cuda OBJECT ${cuda_sources} ${cuda_instances})
target_include_directories(kernels_cuda PRIVATE csrc/include csrc/cuda)
set_target_properties(kernels_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden)
target_compile_definitions(_native PRIVATE QUIETSTAR_WITH_CUDA QUIETSTAR_CUDA_ARCHS="sm_${shown}")
target_sources(_native PRIVATE csrc/bindings_cuda.cpp $<TARGET_OBJECTS:kernels_cuda>)
set_target_properties(_native PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(_native PRIVATE cudart_static ${CMAKE_DL_LIBS} pthread rt)
target_link_directories(_native PRIVATE ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
