// Host side of one forward kernel: grid, shared memory, launch, combine. Instantiated once a row by cmake/generate.py.
#pragma once

#include <atomic>
#include <cstdio>

#include "host/cuda_check.h"
#include "host/params.h"
#include "kernels/combine.h"
#include "sm80/forward/kernel.h"

namespace broadhead::sm80 {

template <class Traits>
int launch_forward(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                   std::size_t error_size) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const auto fail = [&](const char* step, cudaError_t status) {
    char shape[256];
    std::snprintf(shape, sizeof(shape),
                  "batch %d, seqlen_q %d, seqlen_k %d, heads %d/%d, head_dim %d/%d, page_size %d, num_splits %d, "
                  "shared memory %d bytes",
                  params.batch, params.seqlen_q, params.seqlen_k, params.num_heads_q, params.num_heads_kv,
                  params.head_dim, params.head_dim_v, params.page_size, params.num_splits, kSmemBytes);
    return check_cuda(status, kernel_id, step, shape, error, error_size);
  };

  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return fail("cudaGetDevice", status);
  // Once a device: the opt-in to more than 48 KB, checked against what the device reports.
  static std::atomic<unsigned long long> prepared{0};
  const unsigned long long bit = 1ull << (device & 63);
  if (!(prepared.load(std::memory_order_acquire) & bit)) {
    int available = 0;
    if (const cudaError_t status =
            cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
      return fail("cudaDeviceGetAttribute", status);
    }
    if (kSmemBytes > available) {
      std::snprintf(error, error_size, "%s needs %d bytes of shared memory a block, device %d offers %d", kernel_id,
                    kSmemBytes, device, available);
      return 1;
    }
    if (const cudaError_t status =
            cudaFuncSetAttribute(forward_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes)) {
      return fail("cudaFuncSetAttribute", status);
    }
    prepared.fetch_or(bit, std::memory_order_release);
  }

  const int rows_per_token = params.pack_gqa ? params.num_heads_q / params.num_heads_kv : 1;
  const int heads = params.pack_gqa ? params.num_heads_kv : params.num_heads_q;
  const long long rows = static_cast<long long>(params.seqlen_q) * rows_per_token;
  const int m_blocks = static_cast<int>((rows + Traits::kTileM - 1) / Traits::kTileM);
  const long long blocks = static_cast<long long>(m_blocks) * heads * params.batch;
  if (blocks == 0) return 0;
  if (params.head_dim > Traits::kHeadDim || params.head_dim_v > Traits::kHeadDim) {
    return fail("head_dim", cudaErrorInvalidValue);
  }
  if (rows > 0x7fffff00LL || blocks > 0x7fffffffLL || params.num_splits > 65535)
    return fail("grid", cudaErrorInvalidValue);
  forward_kernel<Traits>
      <<<dim3(static_cast<unsigned>(blocks), params.num_splits), Traits::kThreads, kSmemBytes, stream>>>(params,
                                                                                                         m_blocks);
  if (const cudaError_t status = cudaGetLastError()) return fail("launch", status);
  if (params.num_splits == 1) return 0;
  constexpr bool kIsBf16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  return launch_split_combine(params, kIsBf16, false, stream, error, error_size);
}

}  // namespace broadhead::sm80
