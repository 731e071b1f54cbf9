// Merging of two attention results of the same queries over disjoint keys (the public merge_attn_states).
#pragma once

#include <cstddef>

#include "host/params.h"

struct CUstream_st;

namespace broadhead {

int launch_merge_states(const MergeStatesParams& params, CUstream_st* stream, char* error, std::size_t error_size);

}  // namespace broadhead
