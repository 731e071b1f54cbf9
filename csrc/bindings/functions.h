// The functions of the Python module that have files of their own; signatures: python/broadhead/_C.pyi.
#pragma once

#include "bindings/argument_reader.h"

namespace broadhead {

pybind11::object run_known(ArgumentReader& reader);
pybind11::object run_new(ArgumentReader& reader);
// Likewise over keys that all sequences share.
pybind11::object run_known_shared(ArgumentReader& reader);
pybind11::object run_new_shared(ArgumentReader& reader);
// Likewise of a call that appends new keys first: one Launch of two kernels.
pybind11::object run_known_append(ArgumentReader& reader);
pybind11::object remember_append(ArgumentReader& reader);

// Runs a backward call by its BackwardLaunch.
void run_backward(ArgumentReader& reader);
void append_kv(ArgumentReader& reader);
pybind11::object run_known_merge(ArgumentReader& reader);
pybind11::object run_new_merge(ArgumentReader& reader);
pybind11::object run_known_metadata(ArgumentReader& reader);
pybind11::object run_new_metadata(ArgumentReader& reader);

}  // namespace broadhead
