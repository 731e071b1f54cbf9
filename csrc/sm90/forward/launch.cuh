// Host side of one Hopper forward kernel. Instantiated once a row by cmake/generate.py.
#pragma once

#include "sm90/forward/kernel.h"
#include "tma/launch.cuh"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct ForwardKernel {
  static constexpr auto get() { return forward_kernel<Traits>; }
};

template <class Traits>
int launch_forward(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                   std::size_t error_size) {
  return launch_with_tail<ForwardKernel, Traits>(kernel_id, params, stream, error, error_size);
}

}  // namespace broadhead::sm90
