# Defines the imported target asymq::libtorch and ASYMQ_TORCH_VERSION, ASYMQ_TORCH_HAS_CUDA,
# ASYMQ_TORCH_CUDA_MAJOR.
#
# torch's own CMake package is not used: that of a CUDA wheel fails on a machine without the CUDA
# toolkit, and where there is one it overrides CMAKE_CUDA_ARCHITECTURES.
# torch is looked for in ASYMQ_TORCH_ROOT, the folder of a wheel or of a LibTorch archive without
# Python, else where Python3_EXECUTABLE (or the first python3) has it.
if(TARGET asymq::libtorch)
  return()
endif()

if(NOT ASYMQ_TORCH_ROOT)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
      "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('torch').origin))"
    OUTPUT_VARIABLE asymq_torch_root OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE asymq_torch_missing ERROR_QUIET)
  if(asymq_torch_missing)
    message(FATAL_ERROR "asymq needs torch: ${Python3_EXECUTABLE} has none; set Python3_EXECUTABLE "
                        "or ASYMQ_TORCH_ROOT (the folder with torch's lib and include)")
  endif()
  set(ASYMQ_TORCH_ROOT ${asymq_torch_root} CACHE PATH "Folder with torch's lib and include")
endif()

# A wheel says its version in version.py, an archive in build-version, such as 2.15.0+cu132.
set(asymq_torch_cuda "")
if(EXISTS ${ASYMQ_TORCH_ROOT}/version.py)
  file(STRINGS ${ASYMQ_TORCH_ROOT}/version.py asymq_torch_version REGEX "^__version__ = ")
  string(REGEX REPLACE ".*'([^']+)'.*" "\\1" ASYMQ_TORCH_VERSION "${asymq_torch_version}")
  file(STRINGS ${ASYMQ_TORCH_ROOT}/version.py asymq_torch_cuda REGEX "^cuda[: ].*= ")
elseif(EXISTS ${ASYMQ_TORCH_ROOT}/build-version)
  file(STRINGS ${ASYMQ_TORCH_ROOT}/build-version ASYMQ_TORCH_VERSION LIMIT_COUNT 1)
  # The major version is that of the runtime beside it, libcudart-<hash>.so.13, or in +cu132.
  file(GLOB asymq_torch_cuda RELATIVE ${ASYMQ_TORCH_ROOT}/lib
    "${ASYMQ_TORCH_ROOT}/lib/libcudart*.so.*")
  string(REGEX REPLACE ".*\\.so" "" asymq_torch_cuda "${asymq_torch_cuda}")
  if(NOT asymq_torch_cuda AND ASYMQ_TORCH_VERSION MATCHES "\\+cu([0-9]+)[0-9]$")
    set(asymq_torch_cuda ${CMAKE_MATCH_1})
  endif()
endif()
if(NOT ASYMQ_TORCH_VERSION OR NOT EXISTS ${ASYMQ_TORCH_ROOT}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "ASYMQ_TORCH_ROOT=${ASYMQ_TORCH_ROOT} is not torch's folder: it needs lib, "
                      "include, and version.py (of a wheel) or build-version (of LibTorch)")
endif()
string(REGEX MATCH "[0-9]+" ASYMQ_TORCH_CUDA_MAJOR "${asymq_torch_cuda}")

add_library(asymq::libtorch INTERFACE IMPORTED)
target_include_directories(asymq::libtorch SYSTEM INTERFACE
  ${ASYMQ_TORCH_ROOT}/include ${ASYMQ_TORCH_ROOT}/include/torch/csrc/api/include)
target_compile_features(asymq::libtorch INTERFACE cxx_std_20)
target_link_libraries(asymq::libtorch INTERFACE
  ${ASYMQ_TORCH_ROOT}/lib/libtorch.so
  ${ASYMQ_TORCH_ROOT}/lib/libtorch_cpu.so
  ${ASYMQ_TORCH_ROOT}/lib/libc10.so)
set(ASYMQ_TORCH_HAS_CUDA OFF)
if(EXISTS ${ASYMQ_TORCH_ROOT}/lib/libtorch_cuda.so)
  set(ASYMQ_TORCH_HAS_CUDA ON)
  # No program refers to a symbol of libtorch_cuda, and libtorch does not pull it in: without this a
  # C++ program would not see the GPU. A library without CUDA kernels serves torches without it.
  target_link_libraries(asymq::libtorch INTERFACE
    "$<$<NOT:$<BOOL:$<TARGET_PROPERTY:ASYMQ_WITHOUT_CUDA>>>:-Wl,--push-state,--no-as-needed;\
${ASYMQ_TORCH_ROOT}/lib/libtorch_cuda.so;${ASYMQ_TORCH_ROOT}/lib/libc10_cuda.so;-Wl,--pop-state>")
  # Its CUDA libraries come from other wheels beside torch, found through libtorch_cuda's own RPATH.
  target_link_options(asymq::libtorch INTERFACE -Wl,--allow-shlib-undefined)
endif()
