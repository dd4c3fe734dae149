# kinml_torch: headers and libraries of the torch in CMAKE_PREFIX_PATH or Torch_DIR.
#
# By its files: torch's own find_package(Torch) wants a CUDA toolkit beside every torch with CUDA, and looks for more than
# the ops need.
find_path(
  KINML_TORCH_CONFIG TorchConfig.cmake
  HINTS ${Torch_DIR} ${Torch_ROOT} ${CMAKE_PREFIX_PATH} ENV Torch_DIR ENV CMAKE_PREFIX_PATH
  PATH_SUFFIXES Torch share/cmake/Torch
  NO_CACHE)
if(NOT KINML_TORCH_CONFIG)
  message(FATAL_ERROR "KINML_WITH_TORCH=ON, but there is no torch in CMAKE_PREFIX_PATH or Torch_DIR: give "
                      "-DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')\".")
endif()
cmake_path(SET torch_folder NORMALIZE "${KINML_TORCH_CONFIG}/../../..")
message(STATUS "torch: ${torch_folder}")
set(torch_libraries ${torch_folder}/lib)

add_library(kinml_torch INTERFACE)
target_include_directories(kinml_torch SYSTEM INTERFACE ${torch_folder}/include
                                                        ${torch_folder}/include/torch/csrc/api/include)
# libtorch has no symbol of its own and brings libtorch_cuda where there is one.
target_link_libraries(
  kinml_torch INTERFACE "LINKER:--no-as-needed,${torch_libraries}/libtorch.so,--as-needed" ${torch_libraries}/libtorch_cpu.so
                        ${torch_libraries}/libc10.so)
set(torch_has_cuda OFF)
if(EXISTS ${torch_libraries}/libtorch_cuda.so)
  set(torch_has_cuda ON)
endif()
