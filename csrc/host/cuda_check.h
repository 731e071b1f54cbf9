// Turns a CUDA error into the error text of a launcher: kernel, step, CUDA's words.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>

namespace broadhead {

// Returns 0 when `status` is success; else writes "<kernel>: <step>: <CUDA's words> [<shape>]" and returns 1.
// `shape` says what was launched (grid, tile, problem); nullable.
inline int check_cuda(cudaError_t status, const char* kernel, const char* step, const char* shape, char* error,
                      std::size_t error_size) {
  if (status == cudaSuccess) return 0;
  // Clears the launch error: the next call must not report this one. Sticky errors stay.
  static_cast<void>(cudaGetLastError());
  const char* hint = "";
  if (status == cudaErrorNoKernelImageForDevice) {
    hint = "; this library holds no code for this device: build with its architecture in BROADHEAD_CUDA_ARCHS";
  } else if (status == cudaErrorInsufficientDriver) {
    hint = "; the NVIDIA driver is missing or older than the CUDA version of this library";
  }
  std::snprintf(error, error_size, "%s: %s: %s (%s)%s%s%s%s", kernel, step, cudaGetErrorString(status),
                cudaGetErrorName(status), shape != nullptr ? " [" : "", shape != nullptr ? shape : "",
                shape != nullptr ? "]" : "", hint);
  return 1;
}

}  // namespace broadhead
