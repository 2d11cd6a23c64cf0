# Instances of thought_attention's kernels: one file each, so that they compile side by side. Writes
# them into the folder INSTANCES, and sets cuda_instances to the list of the files. Also a script:
#   cmake -DINSTANCES=FOLDER -P csrc/cuda/instances.cmake
if(CMAKE_SCRIPT_MODE_FILE)
  cmake_minimum_required(VERSION 3.24)
endif()

function(add_instance pass name arguments)  # then: element types
  set(functions "")
  foreach(type IN LISTS ARGN)
    string(APPEND functions
           "template void launch_${pass}<${type}, ${arguments}>(const Arguments&, const Device&);\n")
  endforeach()
  set(file "${INSTANCES}/thought_attention_${pass}_${name}.cu")
  configure_file("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/instance.cu.in" "${file}" @ONLY)
  set(cuda_instances ${cuda_instances} "${file}" PARENT_SCOPE)
endfunction()

set(cuda_instances "")
foreach(pass IN ITEMS forward backward)
  foreach(head_size IN ITEMS 64 96 128 256)
    add_instance(${pass} ${head_size} "${head_size}" BFloat16 Float16)
  endforeach()
  # In the shared memory of a graphics card.
  add_instance(${pass} 256_small "256, true" BFloat16 Float16)
  foreach(head_size IN ITEMS 64 128 256)
    add_instance(${pass} float_${head_size} "${head_size}" float)
  endforeach()
endforeach()
