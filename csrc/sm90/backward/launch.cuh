// Host side of the Hopper backward kernels: D, then dK and dV, then dQ; or D, then the fused kernel, then dQ from its
// sums. Instantiated once a row by cmake/generate.py.
#pragma once

#include "sm90/backward/finish.h"
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
  if (begin_backward<Traits>(params, report, stream)) return 1;
  if (launch_capped<typename Traits::Keys>(params, report, stream)) return 1;
  return launch_capped<typename Traits::Queries>(params, report, stream);
}

// Where the sums of dQ begin in the workspace, and their bytes.
inline std::int64_t dq_sums_offset(const AttnBwdParams& params) {
  return (backward_prepare_bytes(params) + 255) / 256 * 256;
}
template <class Traits>
std::int64_t dq_sums_bytes(const AttnBwdParams& params) {
  return params.num_heads_q * dq_tiles(params) * 64 * Traits::kTileColumns * static_cast<std::int64_t>(sizeof(float));
}

template <class Traits>
std::int64_t fused_workspace(const AttnBwdParams& params) {
  return dq_sums_offset(params) + dq_sums_bytes<typename Traits::Keys>(params);
}

template <class Traits>
int launch_fused(const char* kernel_id, const AttnBwdParams& params, cudaStream_t stream, char* error,
                 std::size_t error_size) {
  using Keys = typename Traits::Keys;
  const CallReport report{kernel_id, params, sizeof(typename Traits::SharedStorage), error, error_size};
  if (begin_backward<Traits>(params, report, stream)) return 1;
  char* workspace = static_cast<char*>(params.workspace);
  float* sums = reinterpret_cast<float*>(workspace + dq_sums_offset(params));
  if (const cudaError_t status = cudaMemsetAsync(sums, 0, dq_sums_bytes<Keys>(params), stream)) {
    return report.fail("clearing of the sums of dq", status);
  }
  if (launch_capped<Keys>(params, report, stream, sums)) return 1;
  const LaunchShape shape{.grid = dim3(ceil_div(params.seqlen_q, 64), params.num_heads_q, params.batch),
                          .threads = 128 * Keys::kConsumers,
                          .smem_bytes = 0};
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return 0;
  const auto* tiles = reinterpret_cast<const float4*>(sums);
  if (const cudaError_t status = launch_kernel(finish_dq<Keys>, shape, stream, params, tiles, dq_tiles(params))) {
    return report.fail("launch of dq from its sums", status);
  }
  return 0;
}

}  // namespace broadhead::sm90
