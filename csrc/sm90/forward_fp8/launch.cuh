// Host side of one Hopper forward kernel for e4m3. Instantiated once a row by cmake/generate.py.
#pragma once

#include "sm90/forward_fp8/kernel.h"
#include "tma/launch.cuh"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct Fp8Kernel {
  static constexpr auto get() { return fp8_kernel<Traits>; }
};

template <class Traits>
int launch_fp8(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
               std::size_t error_size) {
  return launch_with_tail<Fp8Kernel, Traits>(kernel_id, params, stream, error, error_size);
}

}  // namespace broadhead::sm90
