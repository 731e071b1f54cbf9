// The functions of the Python module that have files of their own; signatures: python/broadhead/_C.pyi.
#pragma once

#include "bindings/argument_reader.h"

namespace broadhead {

pybind11::object run_known(ArgumentReader& reader);
pybind11::object run_new(ArgumentReader& reader);
// Likewise over keys that all sequences share.
pybind11::object run_known_shared(ArgumentReader& reader);
pybind11::object run_new_shared(ArgumentReader& reader);
void forget_calls();
// bytes that tell apart calls that validation could tell apart by these tensors, the first five also by alignment; None
// when a tensor can not be read.
pybind11::object signature(PyObject* const* tensors, Py_ssize_t count);
// The same of a whole call and of what else belongs to it: (a tuple with an item for each Argument, a tuple).
pybind11::object call_signature(ArgumentReader& reader);

// Runs a backward call by its BackwardLaunch.
void run_backward(ArgumentReader& reader);
void append_kv(ArgumentReader& reader);
void merge_states(ArgumentReader& reader);

}  // namespace broadhead
