// Merging of partial attention results (split-KV and the public flash_attn_combine).
#pragma once

#include <cstddef>

#include "host/params.h"

struct CUstream_st;

namespace broadhead {

// Merges the partials of one forward call into out and softmax_lse; sequences that used one split are left alone.
// `dependent`: by programmatic launch behind a kernel that allows it, on a device that has it.
int launch_split_combine(const AttnParams& params, bool is_bf16, bool dependent, CUstream_st* stream, char* error,
                         std::size_t error_size);
int launch_combine(const CombineParams& params, CUstream_st* stream, char* error, std::size_t error_size);

}  // namespace broadhead
