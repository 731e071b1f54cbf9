// What launchers of backward kernels of every family do on the host.
#pragma once

#include "common/dq_sums.h"
#include "host/launch.cuh"
#include "host/params.h"
#include "kernels/backward_prepare.h"

namespace broadhead {

// The checks and the launches that all calls begin with, for kernels that take up to `head_dim` and `head_dim_v`. 0, or
// what the call returns.
template <class Element>
int begin_backward(const AttnBwdParams& params, int head_dim, int head_dim_v, const CallReport& report,
                   cudaStream_t stream) {
  if (params.head_dim > head_dim || params.head_dim_v > head_dim_v) {
    return report.fail("head_dim", cudaErrorInvalidValue);
  }
  if (params.num_heads_q > 65535 || params.batch > 65535) return report.fail("grid", cudaErrorInvalidValue);
  constexpr bool kIsBf16 = std::is_same_v<Element, cutlass::bfloat16_t>;
  if (const int status = launch_backward_prepare(params, kIsBf16, static_cast<float*>(params.workspace), stream)) {
    return report.fail("launch of the row sums", static_cast<cudaError_t>(status));
  }
  return 0;
}

// Where the sums of dQ begin in the workspace of a fused kernel, and their bytes.
inline std::int64_t dq_sums_offset(const AttnBwdParams& params) {
  return (backward_prepare_bytes(params) + 255) / 256 * 256;
}
template <class Layout>
std::int64_t dq_sums_bytes(const AttnBwdParams& params) {
  return params.num_heads_q * dq_tiles(params, Layout::kRows) * (Layout::kRows * Layout::kColumns) *
         static_cast<std::int64_t>(sizeof(float));
}

template <class Layout>
std::int64_t dq_sums_workspace(const AttnBwdParams& params) {
  return dq_sums_offset(params) + dq_sums_bytes<Layout>(params);
}

// Clears the sums of dQ, calls `launch(sums)` for the kernel that adds to them, and makes dQ of them. 0, or what the
// call returns.
template <class Element, class Layout, class Launch>
int launch_with_dq_sums(const AttnBwdParams& params, const CallReport& report, cudaStream_t stream,
                        const Launch& launch) {
  float* sums = reinterpret_cast<float*>(static_cast<char*>(params.workspace) + dq_sums_offset(params));
  if (const cudaError_t status = cudaMemsetAsync(sums, 0, dq_sums_bytes<Layout>(params), stream)) {
    return report.fail("clearing of the sums of dq", status);
  }
  if (launch(sums)) return 1;
  const LaunchShape shape{.grid = dim3(ceil_div(params.seqlen_q, kFinishRows), params.num_heads_q, params.batch),
                          .threads = kFinishThreads,
                          .smem_bytes = 0};
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return 0;
  if (const cudaError_t status = launch_kernel(finish_dq<Element, Layout>, shape, stream, params, sums)) {
    return report.fail("launch of dq from its sums", status);
  }
  return 0;
}

}  // namespace broadhead
