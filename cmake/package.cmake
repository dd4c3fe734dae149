# Installation: find_package(kinml_fast), with the targets that are built and their public headers.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/kinml_fast)

# Install headers, relative to csrc, and all that they include. Component headers: they can be installed without a build.
function(kinml_install_headers)
  set(todo ${ARGN})
  set(found)
  while(todo)
    list(POP_FRONT todo header)
    if(header IN_LIST found)
      continue()
    endif()
    list(APPEND found ${header})
    cmake_path(GET header PARENT_PATH folder)
    file(STRINGS ${header} includes REGEX "^#include \"")
    foreach(line IN LISTS includes)
      string(REGEX REPLACE "^#include \"(.*)\".*" "\\1" included "${line}")
      cmake_path(ABSOLUTE_PATH included BASE_DIRECTORY ${folder} NORMALIZE)
      list(APPEND todo ${included})
    endforeach()
  endwhile()
  foreach(header IN LISTS found)
    cmake_path(GET header PARENT_PATH folder)
    cmake_path(RELATIVE_PATH folder BASE_DIRECTORY ${PROJECT_SOURCE_DIR}/csrc)
    install(FILES ${header} DESTINATION include/kinml_fast/${folder} COMPONENT headers)
  endforeach()
endfunction()

set(installed_targets kinml_core_cpu)
file(GLOB headers CONFIGURE_DEPENDS csrc/core/*.h csrc/cpu/*_cpu.h csrc/cpu/dispatch.h)
kinml_install_headers(${headers})
set(find_cuda)
if(cuda)
  list(APPEND installed_targets kinml_core_cuda)
  file(GLOB headers CONFIGURE_DEPENDS csrc/cuda/*_cuda.h)
  kinml_install_headers(${headers})
  set(find_cuda "find_dependency(CUDAToolkit)\n")
endif()
if(KINML_WITH_TORCH)
  list(APPEND installed_targets kinml_ops)
endif()

install(TARGETS ${installed_targets} EXPORT kinml_fast_targets)
install(EXPORT kinml_fast_targets NAMESPACE kinml_fast:: DESTINATION ${package_folder})
write_basic_package_version_file(kinml_fast-config-version.cmake COMPATIBILITY SameMinorVersion)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/kinml_fast-config.cmake
     "include(CMakeFindDependencyMacro)\n"
     "find_dependency(OpenMP COMPONENTS CXX)\n"
     "${find_cuda}"
     "include(\"\${CMAKE_CURRENT_LIST_DIR}/kinml_fast_targets.cmake\")\n"
     "foreach(component IN LISTS kinml_fast_FIND_COMPONENTS)\n"
     "  if(NOT TARGET kinml_fast::\${component} AND kinml_fast_FIND_REQUIRED_\${component})\n"
     "    set(kinml_fast_FOUND FALSE)\n"
     "    set(kinml_fast_NOT_FOUND_MESSAGE \"this installation has no \${component}\")\n"
     "  endif()\n"
     "endforeach()\n")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kinml_fast-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/kinml_fast-config-version.cmake DESTINATION ${package_folder})
