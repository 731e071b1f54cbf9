// Makes the Launch of a kind of calls from the Python records that decided it: a CheckedCall and a Plan.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/attention_call.h"
#include "bindings/backward.h"

namespace broadhead {

// The tensors of the first call say the rest of its argument block.
Launch make_launch(pybind11::handle call, pybind11::handle plan, int device, const pybind11::tuple& out,
                   const pybind11::tuple& lse, const pybind11::tuple& identity, const pybind11::object& dispatch);

BackwardLaunch make_backward_launch(pybind11::handle call, pybind11::handle plan, int device, bool deterministic);

}  // namespace broadhead
