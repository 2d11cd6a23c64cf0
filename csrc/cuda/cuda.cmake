# Compiles csrc/cuda where it is wanted, and says in one line what is built. scripts/build_backend.py
# decides that for pip; without it QUIETSTAR_CUDA=auto takes CUDA where nvcc is found.
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
  set(cuda_missing "${QUIETSTAR_CPU_REASON}")
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
  set(archs "sm_80,sm_90,sm_100,sm_120")
endif()
string(REGEX REPLACE "[ ,;]+" ";" archs "${archs}")
# The front end runs once, for compute_80, and ptxas makes every architecture's code from that; its PTX
# is kept as well, which lets other devices compile the kernels for themselves. Architectures of a
# letter have instructions of their own and are compiled on their own. Of mixing_head.cu (nvcc 13.0) that
# changes no byte for sm_90; for sm_100 and sm_120 it leaves 9 and 8 per cent of the instructions out, those
# of loops unrolled further, and neither was timed.
set(assembled "")
set(generate "")
foreach(arch IN LISTS archs)
  string(REGEX REPLACE "^sm_" "" number "${arch}")
  if(number MATCHES "^[0-9]+[af]$" OR number MATCHES "^[1-7][0-9]$")
    list(APPEND generate "-gencode=arch=compute_${number},code=sm_${number}")
  elseif(number MATCHES "^[0-9]+$")
    list(APPEND assembled "sm_${number}")
  else()
    message(FATAL_ERROR "QUIETSTAR_CUDA_ARCHS has '${arch}'; expected names like sm_90")
  endif()
endforeach()
if(assembled)
  list(APPEND assembled "compute_80")
  list(APPEND archs "compute_80")
  list(JOIN assembled "," assembled)
  list(APPEND generate "-gencode=arch=compute_80,code=[${assembled}]")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # by the options above

# The packages of PyPI keep libraries in lib, where their nvcc does not look.
get_filename_component(cuda_libraries "${QUIETSTAR_NVCC}/../../lib" ABSOLUTE)
if(EXISTS "${cuda_libraries}/libcudart_static.a")
  set(ENV{LIBRARY_PATH} "${cuda_libraries}:$ENV{LIBRARY_PATH}")
else()
  set(cuda_libraries "")
endif()

set(CMAKE_CUDA_COMPILER "${QUIETSTAR_NVCC}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -Xptxas -v")  # scripts/compile_check.py reads the report
enable_language(CUDA)
list(JOIN archs ", " shown)
message(STATUS "quietstar: CPU and CUDA build (${QUIETSTAR_NVCC} ${CMAKE_CUDA_COMPILER_VERSION}, ${shown})")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND generate "--compress-mode=size")
endif()

add_library(kernels_cuda OBJECT ${cuda_sources} ${cuda_instances})
target_include_directories(kernels_cuda PRIVATE csrc/include csrc/cuda)
set_target_properties(kernels_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden)
target_compile_definitions(_native PRIVATE QUIETSTAR_WITH_CUDA QUIETSTAR_CUDA_ARCHS="${shown}")
target_compile_options(kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${generate}>)
target_sources(_native PRIVATE csrc/bindings_cuda.cpp $<TARGET_OBJECTS:kernels_cuda>)
set_target_properties(_native PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(_native PRIVATE cudart_static ${CMAKE_DL_LIBS} pthread rt)
target_link_directories(_native PRIVATE ${cuda_libraries} ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
