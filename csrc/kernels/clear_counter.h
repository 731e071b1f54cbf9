// Clearing the counter from which the blocks of a persistent kernel take tiles.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace broadhead {

// By a kernel that is launched programmatically and allows it, for devices that have that (9.0 and later): what comes
// behind it on the stream, launched likewise, may take its place while the kernel before it still runs. A
// cudaMemsetAsync would make it wait for that kernel's end and then for the memset.
// PERF(H200, 16 x 8k, 16 query tokens, 32/8 heads of 128, GB/s: 3525 -> 3576)
// Returns a cudaError_t.
int launch_clear_counter(std::int32_t* counter, CUstream_st* stream);

}  // namespace broadhead
