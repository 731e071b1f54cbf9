// Clearing the counter from which the blocks of a persistent kernel take tiles.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace broadhead {

// By a kernel that is launched programmatically and allows it, for devices that have that (9.0 and later): what comes
// behind it on the stream, launched likewise, may take its place while the kernel before it still runs. A
// cudaMemsetAsync would make it wait for that kernel's end and then for the memset. PERF(placeholder) A cudaError_t.
int launch_clear_counter(std::int32_t* counter, CUstream_st* stream);

}  // namespace broadhead
