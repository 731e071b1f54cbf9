// Before the gradients: D of each query, and the gradients of the sinks.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "host/params.h"

namespace broadhead {

// Bytes of scratch that launch_backward_prepare needs.
std::int64_t backward_prepare_bytes(const AttnBwdParams& params);

// AttnBwdParams::delta = rowsum(dout * out) - dlse of every query that a sequence owns, and dsinks. `scratch`: as many
// bytes as backward_prepare_bytes says. `is_bf16`: dtype of out and dout, else fp16. Returns a cudaError_t.
int launch_backward_prepare(const AttnBwdParams& params, bool is_bf16, float* scratch, cudaStream_t stream);

}  // namespace broadhead
