# Flags of the kernel libraries, the compiler launchers, and how many nvcc may run at once.

set(
  BROADHEAD_CUDA_FLAGS
  --expt-relaxed-constexpr
  "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"
  "-Xcompiler=-Wno-psabi"
)
# Cuts a library to a third; nvcc knows it since 12.8.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND BROADHEAD_CUDA_FLAGS --compress-mode=size)
endif()

find_program(BROADHEAD_CCACHE ccache)
mark_as_advanced(BROADHEAD_CCACHE)

set(BROADHEAD_CUDA_LAUNCHER "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/compile_and_check.py")
if(BROADHEAD_ALLOW_SPILLS)
  list(APPEND BROADHEAD_CUDA_LAUNCHER --allow-spills)
endif()
list(APPEND BROADHEAD_CUDA_LAUNCHER --)
if(BROADHEAD_CCACHE)
  list(APPEND BROADHEAD_CUDA_LAUNCHER "${BROADHEAD_CCACHE}")
endif()

# A kernel source takes up to 4 GB to compile: as many at once as fit the memory, at most one a core.
cmake_host_system_information(RESULT memory QUERY TOTAL_PHYSICAL_MEMORY)
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
math(EXPR jobs "${memory} / 4096")
if(jobs GREATER cores)
  set(jobs ${cores})
elseif(jobs LESS 1)
  set(jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS broadhead_nvcc=${jobs})
