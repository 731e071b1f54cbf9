// Host side of the wide Hopper forward kernel. Instantiated once a row by cmake/generate.py.
#pragma once

#include "host/cuda_check.h"
#include "sm90/forward_wide/kernel.h"
#include "tma/launch.cuh"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct WideKernel {
  static constexpr auto get() { return wide_kernel<Traits>; }
};

template <class Traits>
int launch_wide(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                std::size_t error_size) {
  if (Traits::kWithQv && params.qv == nullptr) {
    return check_cuda(cudaErrorInvalidValue, kernel_id, "qv", "none given", error, error_size);
  }
  return launch_either<WideKernel, Traits>(kernel_id, params, stream, error, error_size);
}

}  // namespace broadhead::sm90
