// Host side of the portable backward kernels: D, then dK and dV, then dQ. Instantiated once a row by cmake/generate.py.
#pragma once

#include "host/launch.cuh"
#include "host/params.h"
#include "kernels/backward_prepare.h"
#include "sm80/backward/kernel.h"

namespace broadhead::sm80 {

template <class Traits>
std::int64_t backward_workspace(const AttnBwdParams& params) {
  return backward_prepare_bytes(params);
}

// Launches one of the two kernels of a row; `tensors` says which gradients it gives.
template <class Traits>
int launch_side(const char* kernel_id, const char* tensors, const AttnBwdParams& params, cudaStream_t stream,
                char* error, std::size_t error_size) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const CallReport report{kernel_id, params, kSmemBytes, error, error_size};
  static PreparedKernel prepared;
  KernelLimits limits;
  if (prepared.prepare(backward_kernel<Traits>, Traits::kThreads, report, limits)) return 1;
  const int tiles = ceil_div(Traits::kKeys ? params.seqlen_k : params.seqlen_q, Traits::kRows);
  const int heads = Traits::kKeys ? params.num_heads_kv : params.num_heads_q;
  const long long blocks = static_cast<long long>(tiles) * heads * params.batch;
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffffLL) return report.fail("grid", cudaErrorInvalidValue);
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>(blocks)), .threads = Traits::kThreads, .smem_bytes = kSmemBytes};
  if (const cudaError_t status = launch_kernel(backward_kernel<Traits>, shape, stream, params, tiles)) {
    return report.fail(tensors, status);
  }
  return 0;
}

template <class Traits>
int launch_backward(const char* kernel_id, const AttnBwdParams& params, cudaStream_t stream, char* error,
                    std::size_t error_size) {
  const CallReport report{kernel_id, params, 0, error, error_size};
  if (params.head_dim > Traits::kHeadDim || params.head_dim_v > Traits::kHeadDim) {
    return report.fail("head_dim", cudaErrorInvalidValue);
  }
  if (params.num_heads_q > 65535 || params.batch > 65535) return report.fail("grid", cudaErrorInvalidValue);
  constexpr bool kIsBf16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  float* scratch = static_cast<float*>(params.workspace);
  if (const int status = launch_backward_prepare(params, kIsBf16, scratch, stream)) {
    return report.fail("launch of the row sums", static_cast<cudaError_t>(status));
  }
  if (launch_side<typename Traits::Keys>(kernel_id, "launch of dk and dv", params, stream, error, error_size)) return 1;
  return launch_side<typename Traits::Queries>(kernel_id, "launch of dq", params, stream, error, error_size);
}

}  // namespace broadhead::sm80
