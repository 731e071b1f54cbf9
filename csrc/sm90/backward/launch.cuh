// Host side of the Hopper backward kernels: D, then dK and dV, then dQ; or D, then the fused kernel, then dQ from its
// sums. Instantiated once a row by cmake/generate.py.
#pragma once

#include "sm90/backward/host.cuh"
#include "sm90/backward/kernel.h"

namespace broadhead::sm90 {

using namespace tma;

// The kernel of a side, with a softcap or without.
template <class Side>
int launch_capped(const AttnBwdParams& params, CallReport report, cudaStream_t stream, float* dq_sums = nullptr) {
  using Capped = typename Side::Capped;
  if (params.softcap > 0.f) return launch_side<Capped>(backward_kernel<Capped>, params, report, stream, dq_sums);
  return launch_side<Side>(backward_kernel<Side>, params, report, stream, dq_sums);
}

template <class Traits>
int launch_backward(const char* kernel_id, const AttnBwdParams& params, cudaStream_t stream, char* error,
                    std::size_t error_size) {
  const CallReport report{kernel_id, params, sizeof(typename Traits::SharedStorage), error, error_size};
  if (begin_backward<typename Traits::Element>(params, Traits::kHeadDim, Traits::kHeadDimV, report, stream)) return 1;
  if (launch_capped<typename Traits::Keys>(params, report, stream)) return 1;
  return launch_capped<typename Traits::Queries>(params, report, stream);
}

template <class Traits>
std::int64_t fused_workspace(const AttnBwdParams& params) {
  return dq_sums_workspace<typename Traits::Keys::DqSums>(params);
}

template <class Traits>
int launch_fused(const char* kernel_id, const AttnBwdParams& params, cudaStream_t stream, char* error,
                 std::size_t error_size) {
  using Element = typename Traits::Element;
  using Keys = typename Traits::Keys;
  const CallReport report{kernel_id, params, sizeof(typename Traits::SharedStorage), error, error_size};
  if (begin_backward<Element>(params, Traits::kHeadDim, Traits::kHeadDimV, report, stream)) return 1;
  return launch_with_dq_sums<Element, typename Keys::DqSums>(
      params, report, stream, [&](float* sums) { return launch_capped<Keys>(params, report, stream, sums); });
}

}  // namespace broadhead::sm90
