# Finds the CUTLASS headers: BROADHEAD_CUTLASS_DIR, else the nvidia-cutlass package of the build's Python.

function(broadhead_find_cutlass out)
  set(hints)
  if(BROADHEAD_CUTLASS_DIR)
    list(APPEND hints "${BROADHEAD_CUTLASS_DIR}/include" "${BROADHEAD_CUTLASS_DIR}")
  else()
    # find_spec does not import the package, so its own dependencies need not be there.
    execute_process(
      COMMAND
        "${Python_EXECUTABLE}" -c
        "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0], end='')"
      OUTPUT_VARIABLE package
      ERROR_QUIET
    )
    if(package)
      list(APPEND hints "${package}/source/include")
    endif()
  endif()
  find_path(BROADHEAD_CUTLASS_INCLUDE cute/tensor.hpp HINTS ${hints} NO_CACHE)
  if(NOT BROADHEAD_CUTLASS_INCLUDE)
    message(
      FATAL_ERROR
      "The CUTLASS headers were not found. Run `pip install --no-deps nvidia-cutlass==4.2.0.0` for ${Python_EXECUTABLE}, "
      "or set BROADHEAD_CUTLASS_DIR to a CUTLASS 4 source tree."
    )
  endif()
  set(${out} "${BROADHEAD_CUTLASS_INCLUDE}" PARENT_SCOPE)
endfunction()
