// Clears the tile counter of a persistent kernel, by programmatic launch.
#include "kernels/clear_counter.h"

#include "common/dependent_launch.h"
#include "host/launch.cuh"

namespace broadhead {
namespace {

__global__ void clear_counter_kernel(std::int32_t* counter) {
  launch_dependents();  // they wait for the end of this grid, which waits for that of the grid before
  wait_for_predecessor();
  *counter = 0;
}

}  // namespace

int launch_clear_counter(std::int32_t* counter, CUstream_st* stream) {
  return launch_kernel(clear_counter_kernel, {.grid = dim3(1), .threads = 1, .dependent = true}, stream, counter);
}

}  // namespace broadhead
