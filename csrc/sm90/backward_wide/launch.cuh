// Host side of the wide Hopper backward kernels: D, then dK and dV, then dQ. Instantiated once a row by
// cmake/generate.py.
#pragma once

#include "sm90/backward/host.cuh"
#include "sm90/backward_wide/kernel.h"

namespace broadhead::sm90 {

using namespace tma;

// The kernel of a side, with a softcap or without.
template <class Side>
int launch_pair(const AttnBwdParams& params, CallReport report, cudaStream_t stream) {
  using Capped = typename Side::Capped;
  if (params.softcap > 0.f) return launch_side<Capped>(pair_kernel<Capped>, params, report, stream);
  return launch_side<Side>(pair_kernel<Side>, params, report, stream);
}

template <class Traits>
int launch_pair_backward(const char* kernel_id, const AttnBwdParams& params, cudaStream_t stream, char* error,
                         std::size_t error_size) {
  const CallReport report{kernel_id, params, sizeof(typename Traits::SharedStorage), error, error_size};
  if (begin_backward<typename Traits::Element>(params, Traits::kHeadDim, Traits::kHeadDimV, report, stream)) return 1;
  if (launch_pair<typename Traits::Keys>(params, report, stream)) return 1;
  return launch_pair<typename Traits::Queries>(params, report, stream);
}

}  // namespace broadhead::sm90
