# find_package(asymq) gives the target asymq::asymq, which brings libtorch along.
#
# torch is found through Python3_EXECUTABLE or ASYMQ_TORCH_ROOT and must be of the version that asymq
# was built for: torch's binary interface changes with every minor version.
get_filename_component(asymq_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
include("${CMAKE_CURRENT_LIST_DIR}/libtorch.cmake")
file(STRINGS "${asymq_package}/_build.py" asymq_built_for REGEX "^TORCH_VERSION = ")
string(REGEX REPLACE ".*\"([0-9]+\\.[0-9]+).*\"" "\\1" asymq_built_for "${asymq_built_for}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" asymq_torch_minor "${ASYMQ_TORCH_VERSION}")
if(NOT asymq_built_for STREQUAL asymq_torch_minor)
  message(FATAL_ERROR "asymq in ${asymq_package} was built for torch ${asymq_built_for}, but "
                      "${ASYMQ_TORCH_ROOT} holds torch ${ASYMQ_TORCH_VERSION}")
endif()
include("${CMAKE_CURRENT_LIST_DIR}/asymqTargets.cmake")
set_property(TARGET asymq::asymq APPEND PROPERTY INTERFACE_LINK_LIBRARIES asymq::libtorch)
