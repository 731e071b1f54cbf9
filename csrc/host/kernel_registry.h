// The list of the kernels that a library holds for the rows of the table; the definitions are generated from the table
// by cmake/generate.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "host/params.h"

namespace broadhead {

using ForwardLauncher = int (*)(const AttnParams& params, cudaStream_t stream, char* error, std::size_t error_size);
using BackwardLauncher = int (*)(const AttnBwdParams& params, cudaStream_t stream, char* error, std::size_t error_size);
using ForwardWorkspace = std::int64_t (*)(const AttnParams& params);  // bytes
using BackwardWorkspace = std::int64_t (*)(const AttnBwdParams& params);

// One kernel. It has the functions of its direction; those of the other one are null.
struct RegisteredKernel {
  KernelInfo info;
  const int* shared_memory;  // bytes a block takes
  ForwardLauncher forward;
  ForwardWorkspace forward_workspace;
  BackwardLauncher backward;
  BackwardWorkspace backward_workspace;
};

extern const RegisteredKernel kKernels[];  // ends with an entry without an id
extern const int kKernelCount;
extern const char* const kBuildArchs;  // as compiled: "80;90"

}  // namespace broadhead

// Beyond the C ABI of params.h: bytes of shared memory a block of the kernel takes, for the test of the build output.
BROADHEAD_EXPORT int broadhead_kernel_shared_memory(int index);
