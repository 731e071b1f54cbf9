// Host side of one Hopper forward kernel. Instantiated once a row by cmake/generate.py.
#pragma once

#include "sm90/forward/kernel.h"
#include "tma/launch.cuh"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
int launch_forward(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                   std::size_t error_size) {
  if constexpr (kCanHaveTail<Traits>) {
    using WithTail = typename Traits::WithTail;
    if (has_column_tail<Traits>(params)) {
      return launch_persistent<WithTail>(forward_kernel<WithTail>, kernel_id, params, stream, error, error_size);
    }
  }
  return launch_persistent<Traits>(forward_kernel<Traits>, kernel_id, params, stream, error, error_size);
}

}  // namespace broadhead::sm90
