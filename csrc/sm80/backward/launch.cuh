// Host side of the portable backward kernels: D, then dK and dV, then dQ. Instantiated once a row by cmake/generate.py.
#pragma once

#include "kernels/backward_launch.cuh"
#include "sm80/backward/kernel.h"
#include "sm80/backward/kernel_fused.h"

namespace broadhead::sm80 {

template <class Traits>
std::int64_t backward_workspace(const AttnBwdParams& params) {
  return backward_prepare_bytes(params);
}

// Launches one kernel of a row; `tensors` says which gradients it gives, `more` are its last arguments.
template <class Traits, class Kernel, class... More>
int launch_side(Kernel kernel, const char* kernel_id, const char* tensors, const AttnBwdParams& params,
                cudaStream_t stream, char* error, std::size_t error_size, More... more) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const CallReport report{kernel_id, params, kSmemBytes, error, error_size};
  static PreparedKernel prepared;
  KernelLimits limits;
  if (prepared.prepare(kernel, Traits::kThreads, report, limits)) return 1;
  const int tiles = ceil_div(Traits::kKeys ? params.seqlen_k : params.seqlen_q, Traits::kRows);
  const int heads = Traits::kKeys ? params.num_heads_kv : params.num_heads_q;
  const long long blocks = static_cast<long long>(tiles) * heads * params.batch;
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffffLL) return report.fail("grid", cudaErrorInvalidValue);
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>(blocks)), .threads = Traits::kThreads, .smem_bytes = kSmemBytes};
  if (const cudaError_t status = launch_kernel(kernel, shape, stream, params, tiles, more...)) {
    return report.fail(tensors, status);
  }
  return 0;
}

template <class Traits>
int launch_backward(const char* kernel_id, const AttnBwdParams& params, cudaStream_t stream, char* error,
                    std::size_t error_size) {
  const CallReport report{kernel_id, params, 0, error, error_size};
  using Element = typename Traits::Element;
  if (begin_backward<Element>(params, Traits::kHeadDim, Traits::kHeadDim, report, stream)) return 1;
  using Keys = typename Traits::Keys;
  using Queries = typename Traits::Queries;
  if (launch_side<Keys>(backward_kernel<Keys>, kernel_id, "launch of dk and dv", params, stream, error, error_size)) {
    return 1;
  }
  return launch_side<Queries>(backward_kernel<Queries>, kernel_id, "launch of dq", params, stream, error, error_size);
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
  if (begin_backward<Element>(params, Traits::kHeadDim, Traits::kHeadDim, report, stream)) return 1;
  return launch_with_dq_sums<Element, typename Keys::DqSums>(params, report, stream, [&](float* sums) {
    return launch_side<Keys>(fused_kernel<Keys>, kernel_id, "launch of dk, dv and the sums of dq", params, stream,
                             error, error_size, sums);
  });
}

}  // namespace broadhead::sm80
