# Decides which kernels to build: sets BROADHEAD_BUILD_KERNELS, BROADHEAD_ARCHS and, when off, why.

# The compute capability of the first GPU, as an architecture ("80", "90a"), or an empty string.
function(broadhead_detect_gpu out)
  set(${out} "" PARENT_SCOPE)
  find_program(BROADHEAD_NVIDIA_SMI nvidia-smi)
  mark_as_advanced(BROADHEAD_NVIDIA_SMI)
  if(NOT BROADHEAD_NVIDIA_SMI)
    return()
  endif()
  execute_process(
    COMMAND "${BROADHEAD_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities
    RESULT_VARIABLE status
    ERROR_QUIET
  )
  if(status EQUAL 0 AND capabilities MATCHES "^([0-9]+)\\.([0-9]+)")
    set(arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    if(arch STREQUAL "90")
      set(arch "90a") # what the Hopper kernels need
    endif()
    set(${out} "${arch}" PARENT_SCOPE)
  endif()
endfunction()

function(broadhead_choose_archs)
  set(BROADHEAD_BUILD_KERNELS OFF PARENT_SCOPE)
  set(remedy "set BROADHEAD_CUDA_ARCHS (for example \"80;90a\") or BROADHEAD_KERNEL_DIR")
  set(archs "${BROADHEAD_CUDA_ARCHS}")
  if(BROADHEAD_KERNEL_DIR OR archs STREQUAL "none")
    return()
  endif()

  include(CheckLanguage)
  check_language(CUDA)
  if(archs AND NOT CMAKE_CUDA_COMPILER)
    message(
      FATAL_ERROR
      "BROADHEAD_CUDA_ARCHS is \"${archs}\" but no nvcc was found. Put one on PATH, name it by CUDACXX, or fetch one with "
      "scripts/cuda_from_pypi.sh 13.0"
    )
  endif()
  if(NOT archs)
    broadhead_detect_gpu(archs)
    if(NOT archs)
      set(BROADHEAD_LEFT_OUT "no GPU was found; to build kernels for other machines ${remedy}" PARENT_SCOPE)
      return()
    elseif(NOT CMAKE_CUDA_COMPILER)
      set(
        BROADHEAD_LEFT_OUT
        "no nvcc was found for the GPU (compute capability ${archs}); put one on PATH, name it by CUDACXX, or fetch one with scripts/cuda_from_pypi.sh 13.0"
        PARENT_SCOPE
      )
      return()
    endif()
  endif()
  set(BROADHEAD_BUILD_KERNELS ON PARENT_SCOPE)
  set(BROADHEAD_ARCHS "${archs}" PARENT_SCOPE)
endfunction()
