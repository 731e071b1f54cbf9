// The functions of the Python module that have files of their own; signatures: python/broadhead/_C.pyi.
#pragma once

#include "bindings/argument_reader.h"

namespace broadhead {

void append_kv(ArgumentReader& reader);
void merge_states(ArgumentReader& reader);

}  // namespace broadhead
