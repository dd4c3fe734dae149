# kinml_core_cuda: csrc/cuda, compiled by nvcc for KINML_CUDA_ARCHS. Sets cuda, whether it is built.
#
# scripts/cuda_resources.py takes this file, with the sources, for what its table depends on.

string(TOLOWER "${KINML_CUDA}" cuda)
if(cuda STREQUAL "auto")
  set(cuda OFF)
  if(torch_has_cuda)
    set(cuda ON)
    find_package(CUDAToolkit 12.1 QUIET)
    if(NOT CUDAToolkit_NVCC_EXECUTABLE)
      set(cuda OFF)
      message(STATUS "This torch has CUDA, but there is no nvcc of CUDA 12.1 or newer: "
                     "kinml_fast is built for the CPU only.")
    endif()
  endif()
elseif(cuda MATCHES "^(on|1|true|yes)$")
  set(cuda ON)
  find_package(CUDAToolkit 12.1 QUIET)
  if(NOT CUDAToolkit_NVCC_EXECUTABLE)
    message(FATAL_ERROR "KINML_CUDA=${KINML_CUDA}, but there is no nvcc of CUDA 12.1 or newer: install the CUDA toolkit, "
                        "or set CUDAToolkit_ROOT to where it is; KINML_CUDA=OFF builds for the CPU.")
  endif()
elseif(cuda MATCHES "^(off|0|false|no)$")
  set(cuda OFF)
else()
  message(FATAL_ERROR "KINML_CUDA must be auto, OFF or ON, not '${KINML_CUDA}'.")
endif()
if(NOT cuda)
  return()
endif()

execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} --list-gpu-code OUTPUT_VARIABLE known)
string(REGEX MATCHALL "[0-9]+" known "${known}")
set(architectures ${KINML_CUDA_ARCHS})
list(SORT architectures COMPARE NATURAL)
foreach(architecture IN LISTS architectures)
  string(REGEX REPLACE "[af]$" "" plain ${architecture})
  if(NOT plain IN_LIST known)
    message(STATUS "nvcc ${CUDAToolkit_VERSION} does not know the architecture ${architecture}: it is left out.")
    list(REMOVE_ITEM architectures ${architecture})
  endif()
endforeach()
if(NOT architectures)
  message(FATAL_ERROR "KINML_CUDA_ARCHS=${KINML_CUDA_ARCHS}: nvcc ${CUDAToolkit_VERSION} knows ${known}.")
endif()

# Never -use_fast_math: results must not depend on how the compiler rounds.
set(nvcc_flags -std=c++20 -O3 -lineinfo -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler
               -fPIC,-fvisibility=hidden,-fno-math-errno)
if(KINML_CUDA_REPORT)
  # For developers and .ci/run: a user's compiler may warn about what ours does not.
  list(APPEND nvcc_flags -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v)
endif()
# Machine code for each, and what the driver compiles for newer ones (PTX of the newest).
foreach(architecture IN LISTS architectures)
  list(APPEND nvcc_flags -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET architectures -1 newest)
if(newest MATCHES "^[0-9]+$")
  list(APPEND nvcc_flags -gencode arch=compute_${newest},code=compute_${newest})
endif()

# nvcc itself: the language CUDA of CMake would want one architecture list and one standard that the CMake in use knows of.
set(cuda_objects)
file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/cuda)
foreach(source IN LISTS cuda_sources)
  cmake_path(GET source STEM name)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
  set(report)
  if(KINML_CUDA_REPORT)
    set(text ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.txt)
    set(report > ${text} 2>&1 || sh -c "cat '${text}' && false")
  endif()
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} ${nvcc_flags} -MMD -MF ${object}.d -c ${source} -o ${object} ${report}
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "nvcc ${name}.cu"
    VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
add_library(kinml_core_cuda STATIC ${cuda_objects})
add_library(kinml_fast::kinml_core_cuda ALIAS kinml_core_cuda)
set_target_properties(kinml_core_cuda PROPERTIES LINKER_LANGUAGE CXX)
target_compile_features(kinml_core_cuda INTERFACE cxx_std_20)
target_include_directories(kinml_core_cuda INTERFACE $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc>
                                                     $<INSTALL_INTERFACE:include/kinml_fast>)
target_link_libraries(kinml_core_cuda INTERFACE CUDA::cudart_static)

if(KINML_CUDA_REPORT)
  # Everything in one library without an undefined symbol.
  add_library(kinml_cuda_closed SHARED EXCLUDE_FROM_ALL ${cuda_objects})
  set_target_properties(kinml_cuda_closed PROPERTIES LINKER_LANGUAGE CXX)
  target_link_options(kinml_cuda_closed PRIVATE LINKER:--no-undefined)
  target_link_libraries(kinml_cuda_closed PRIVATE CUDA::cudart_static)
endif()
