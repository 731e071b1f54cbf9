// What backward calls of a kind have in common.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/kernel_library.h"
#include "host/params.h"

namespace broadhead {

struct BackwardLaunch {
  // From the records that decided it, as a Launch.
  BackwardLaunch(pybind11::handle call, pybind11::handle plan, int device_index, bool deterministic);

  const Kernel& kernel;
  pybind11::int_ device;
  AttnBwdParams params;  // the numbers; tensors say the rest
};

}  // namespace broadhead
