// Host side of one portable forward kernel: grid, shared memory, launch, combine. Instantiated once a row by
// cmake/generate.py.
#pragma once

#include "host/launch.cuh"
#include "host/params.h"
#include "host/split_workspace.h"
#include "kernels/combine.h"
#include "sm80/forward/kernel.h"

namespace broadhead::sm80 {

template <class Traits>
std::int64_t forward_workspace(const AttnParams& params) {
  return split_workspace_bytes(params, false);
}

template <class Traits>
int launch_forward_kernel(const char* kernel_id, AttnParams& params, cudaStream_t stream, char* error,
                          std::size_t error_size) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const CallReport report{kernel_id, params, kSmemBytes, error, error_size};
  static PreparedKernel prepared;
  KernelLimits limits;
  if (prepared.prepare(forward_kernel<Traits>, Traits::kThreads, report, limits)) return 1;

  const long long rows = static_cast<long long>(params.seqlen_q) * params.rows_per_token;
  const int m_blocks = static_cast<int>((rows + Traits::kTileM - 1) / Traits::kTileM);
  const long long ctas = static_cast<long long>(m_blocks) * params.heads_in_grid * params.batch;
  if (ctas == 0) return 0;
  if (params.head_dim > Traits::kHeadDim || params.head_dim_v > Traits::kHeadDim) {
    return report.fail("head_dim", cudaErrorInvalidValue);
  }
  if (rows > 0x7fffff00LL || ctas > 0x7fffffffLL || params.num_splits > 65535)
    return report.fail("grid", cudaErrorInvalidValue);
  if (!place_split_workspace(params, false)) return report.fail("workspace", cudaErrorInvalidValue);
  forward_kernel<Traits>
      <<<dim3(static_cast<unsigned>(ctas), params.num_splits), Traits::kThreads, kSmemBytes, stream>>>(
          params, TileGrid(m_blocks, params.heads_in_grid, params.batch, params.heads_per_section));
  if (const cudaError_t status = cudaGetLastError()) return report.fail("launch", status);
  if (params.num_splits == 1) return 0;
  constexpr bool kIsBf16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  return launch_split_combine(params, kIsBf16, false, stream, error, error_size);
}

template <class Traits>
int launch_forward(const char* kernel_id, const AttnParams& given, cudaStream_t stream, char* error,
                   std::size_t error_size) {
  AttnParams params = given;
  using Paged = PagedCallOr<Traits>;
  const auto launch = !is_plain(params) || params.num_splits > 1 ? launch_forward_kernel<Traits>
                      : params.page_table == nullptr             ? launch_forward_kernel<PlainCall<Traits>>
                                                                 : launch_forward_kernel<Paged>;
  return launch(kernel_id, params, stream, error, error_size);
}

}  // namespace broadhead::sm80
