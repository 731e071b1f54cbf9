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

# Why CMake has no CUDA language: that there is no compiler, or that the one that was named or found does not work.
function(broadhead_explain_no_nvcc out)
  set(remedy "Put one on PATH, name it by CUDACXX, or fetch one with scripts/cuda_from_pypi.sh 13.0")
  # As CMake chooses: the cache, the environment, PATH.
  if(CMAKE_CUDA_COMPILER)
    set(named "${CMAKE_CUDA_COMPILER}, which CMAKE_CUDA_COMPILER names,")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(named "$ENV{CUDACXX}, which CUDACXX names,")
  else()
    find_program(nvcc nvcc NO_CACHE NO_DEFAULT_PATH PATHS ENV PATH)
    if(NOT nvcc)
      set(${out} "no nvcc was found. ${remedy}" PARENT_SCOPE)
      return()
    endif()
    set(named "${nvcc}, which PATH holds,")
  endif()
  # check_language keeps the reason to itself: a project that needs the language tells it.
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/WhyNoCuda")
  file(REMOVE_RECURSE "${probe}")
  file(
    WRITE "${probe}/CMakeLists.txt"
    "cmake_minimum_required(VERSION ${CMAKE_MINIMUM_REQUIRED_VERSION})\nproject(why LANGUAGES CUDA)\n"
  )
  set(compiler)
  if(CMAKE_CUDA_COMPILER)
    set(compiler "-DCMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER}")
  endif()
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -S "${probe}" -B "${probe}/build" -G "${CMAKE_GENERATOR}" ${compiler}
    OUTPUT_QUIET
    ERROR_VARIABLE reason
  )
  string(REGEX REPLACE "\n[ \n]*\n" "\n" reason "\n${reason}")
  # A notice, as an error would be wrapped anew.
  message(NOTICE "broadhead: CMake says of the CUDA compiler:${reason}")
  set(
    ${out}
    "the CUDA compiler ${named} does not work, for the reason above. Mend it or choose another: ${remedy}"
    PARENT_SCOPE
  )
endfunction()

function(broadhead_choose_archs)
  set(BROADHEAD_BUILD_KERNELS OFF PARENT_SCOPE)
  set(remedy "set BROADHEAD_CUDA_ARCHS (for example \"80;90a\") or BROADHEAD_KERNEL_DIR")
  set(archs "${BROADHEAD_CUDA_ARCHS}")
  if(BROADHEAD_KERNEL_DIR OR archs STREQUAL "none")
    return()
  endif()

  include(CheckLanguage)
  set(named_compiler "${CMAKE_CUDA_COMPILER}")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    # Else the next run in this folder would take this answer for its own.
    unset(CMAKE_CUDA_COMPILER CACHE)
    set(CMAKE_CUDA_COMPILER "${named_compiler}")
  endif()
  if(archs AND NOT CMAKE_CUDA_COMPILER)
    broadhead_explain_no_nvcc(reason)
    message(FATAL_ERROR "BROADHEAD_CUDA_ARCHS is \"${archs}\" but ${reason}")
  endif()
  if(NOT archs)
    broadhead_detect_gpu(archs)
    if(NOT archs)
      set(BROADHEAD_LEFT_OUT "no GPU was found; to build kernels for other machines ${remedy}" PARENT_SCOPE)
      return()
    elseif(NOT CMAKE_CUDA_COMPILER)
      broadhead_explain_no_nvcc(reason)
      set(BROADHEAD_LEFT_OUT "the GPU here has compute capability ${archs} but ${reason}" PARENT_SCOPE)
      return()
    endif()
  endif()
  set(BROADHEAD_BUILD_KERNELS ON PARENT_SCOPE)
  set(BROADHEAD_ARCHS "${archs}" PARENT_SCOPE)
endfunction()
