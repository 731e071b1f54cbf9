// Clears the tile counter of a persistent kernel, by programmatic launch.
#include "kernels/clear_counter.h"

#include <cuda_runtime.h>

#include "common/dependent_launch.h"

namespace broadhead {
namespace {

__global__ void clear_counter_kernel(std::int32_t* counter) {
  launch_dependents();  // they wait for the end of this grid, which waits for that of the grid before
  wait_for_predecessor();
  *counter = 0;
}

}  // namespace

int launch_clear_counter(std::int32_t* counter, CUstream_st* stream) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = allow_dependent(attribute);
  return cudaLaunchKernelEx(&config, clear_counter_kernel, counter);
}

}  // namespace broadhead
