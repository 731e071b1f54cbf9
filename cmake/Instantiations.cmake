# Turns the table into targets: one object library for each set of architectures, one shared library for each family.

function(broadhead_add_kernel_libraries)
  set(out "${CMAKE_CURRENT_BINARY_DIR}/generated")
  set_property(
    DIRECTORY
    APPEND
    PROPERTY
      CMAKE_CONFIGURE_DEPENDS
        "${CMAKE_CURRENT_SOURCE_DIR}/cmake/generate.py"
        "${CMAKE_CURRENT_SOURCE_DIR}/python/broadhead/capabilities.py"
        "${CMAKE_CURRENT_SOURCE_DIR}/python/broadhead/support.py"
        "${CMAKE_CURRENT_SOURCE_DIR}/python/broadhead/tiles.py"
  )
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/generate.py" sources --archs "${BROADHEAD_ARCHS}"
      --filter "${BROADHEAD_KERNEL_FILTER}" --out "${out}"
    COMMAND_ERROR_IS_FATAL ANY
  )
  include("${out}/instantiations.cmake")
  message(STATUS "broadhead: building ${BROADHEAD_KERNEL_COUNT} kernels for \"${BROADHEAD_ARCHS}\"")

  foreach(family IN LISTS BROADHEAD_FAMILIES)
    set(objects)
    foreach(group IN LISTS BROADHEAD_GROUPS_${family})
      set(target "broadhead_${group}")
      add_library(${target} OBJECT ${BROADHEAD_SOURCES_${group}})
      set_target_properties(
        ${target}
        PROPERTIES
          CUDA_ARCHITECTURES "${BROADHEAD_ARCHS_${group}}"
          CUDA_COMPILER_LAUNCHER "${BROADHEAD_CUDA_LAUNCHER}"
          JOB_POOL_COMPILE broadhead_nvcc
      )
      broadhead_set_kernel_options(${target})
      list(APPEND objects "$<TARGET_OBJECTS:${target}>")
    endforeach()

    add_library(broadhead_${family} MODULE "${BROADHEAD_REGISTRY_${family}}" csrc/host/library.cpp ${objects})
    broadhead_set_kernel_options(broadhead_${family})
    target_link_libraries(broadhead_${family} PRIVATE CUDA::cudart_static)
    target_link_options(
      broadhead_${family}
      PRIVATE LINKER:--exclude-libs,ALL LINKER:--gc-sections LINKER:--strip-all LINKER:--no-undefined
    )
    set_target_properties(broadhead_${family} PROPERTIES PREFIX lib LINKER_LANGUAGE CXX)
    add_custom_command(
      TARGET broadhead_${family}
      POST_BUILD
      COMMAND
        "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/build_report.py" --out
        "$<TARGET_FILE_DIR:broadhead_${family}>/libbroadhead_${family}.json" ${objects}
      COMMAND_EXPAND_LISTS
      VERBATIM
    )
    install(TARGETS broadhead_${family} DESTINATION broadhead COMPONENT kernels)
    install(
      FILES "$<TARGET_FILE_DIR:broadhead_${family}>/libbroadhead_${family}.json"
      DESTINATION broadhead
      COMPONENT kernels
    )
  endforeach()
endfunction()

function(broadhead_set_kernel_options target)
  target_include_directories(${target} PRIVATE csrc)
  target_include_directories(${target} SYSTEM PRIVATE "${BROADHEAD_CUTLASS}" "${CUDAToolkit_INCLUDE_DIRS}")
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${BROADHEAD_CUDA_FLAGS}>")
  set_target_properties(
    ${target}
    PROPERTIES
      POSITION_INDEPENDENT_CODE ON
      CXX_VISIBILITY_PRESET hidden
      CUDA_VISIBILITY_PRESET hidden
      VISIBILITY_INLINES_HIDDEN ON
      CUDA_RUNTIME_LIBRARY Static
  )
endfunction()
