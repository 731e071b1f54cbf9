// Host side of one decode kernel: grid, workspace, launch, combine. Instantiated once a row by cmake/generate.py.
#pragma once

#include <algorithm>
#include <cstdio>

#include "decode/combine_kernel.h"
#include "decode/kernel.h"
#include "host/launch.cuh"
#include "host/params.h"

namespace broadhead::decode {

// How many bytes the grid prefetches into the L2. Prefetching a larger tensor is not worth its time.
inline unsigned prefetched_bytes(std::int64_t bytes) { return bytes <= 2 << 20 ? static_cast<unsigned>(bytes) : 0; }

inline DecodeParams make_decode_params(const AttnParams& params, int tile_cost) {
  DecodeParams result{params};
  result.tile_cost = tile_cost;
  result.pages = params.page_table == nullptr ? 1 : static_cast<unsigned>(params.num_pages);
  result.sees_all = sees_all(params);
  const std::int64_t token = static_cast<std::int64_t>(params.num_heads_q) * params.head_dim;
  const std::int64_t tokens = params.cu_seqlens_q ? params.total_q : params.batch * std::int64_t{params.seqlen_q};
  const bool one_sequence = params.cu_seqlens_q != nullptr || params.batch == 1;
  if (params.q_strides.head == params.head_dim && params.q_strides.row == token &&
      (one_sequence || params.q_strides.batch == params.seqlen_q * token)) {
    result.q_bytes = prefetched_bytes(tokens * token * (params.q_dtype == DataType::kFloat8E4M3 ? 1 : 2));
  }
  if (params.page_table != nullptr && params.kv_batch_idx == nullptr) {
    const std::int64_t columns = params.seqlen_k / params.page_size;
    result.table_bytes = prefetched_bytes(((params.batch - 1) * params.page_table_batch_stride + columns) * 4);
  }
  if (params.shared_seqlen_k > 0) {
    result.shared_table_bytes = prefetched_bytes(((params.shared_seqlen_k - 1ll) / params.page_size + 1) * 4);
    result.shared_sequences = 1;
    result.shared_tokens = static_cast<int>(params.total_q);
    result.live_tokens = params.cu_seqlens_q == nullptr ? nullptr : params.cu_seqlens_q + params.batch;
    // The tokens of all sequences lie one row stride apart; with one token a sequence that is the batch stride.
    if (params.cu_seqlens_q == nullptr && params.seqlen_q == 1) result.q_strides.row = params.q_strides.batch;
  }
  return result;
}

// Whether the stream-K schedule can serve a call with shared keys, whose queries must be one piece of memory.
inline bool shared_keys_fit(const AttnParams& params) {
  const bool one_piece = params.cu_seqlens_q != nullptr || params.seqlen_q == 1 || params.batch == 1 ||
                         params.q_strides.batch == params.seqlen_q * params.q_strides.row;
  return one_piece && params.shared_page_table != nullptr && params.page_table != nullptr && params.page_size > 0 &&
         params.cell_blocks == 0 && params.num_splits != 1 && params.seqused_q == nullptr &&
         params.mask_rule.window_left < 0 && params.mask_rule.window_right <= 0 &&
         params.mask_rule.attention_chunk == 0 && params.prefix_lens == nullptr &&
         params.mask_values.query_ranges == nullptr && params.mask_values.tree_mask == nullptr &&
         params.mask_values.causal_by_sequence == nullptr;
}

// CTAs that can be resident at a time at most. A workspace for so many is large enough, however few of them fit. 0:
// there is no device.
template <class Traits>
int most_ctas(int max_blocks) {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 0;
  }
  const int most = multiprocessors * Traits::kMinBlocks;
  return max_blocks > 0 ? std::min(max_blocks, most) : most;
}

template <class Traits>
std::int64_t decode_workspace(const AttnParams& params) {
  const int ctas = most_ctas<Traits>(params.max_blocks);
  return ctas > 0 ? plan_workspace(params, Traits::kTileM, ctas).bytes : -1;
}

template <class Traits>
int launch_decode(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                  std::size_t error_size) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const CallReport report{kernel_id, params, kSmemBytes, error, error_size};
  const auto fail = [&](const char* step, cudaError_t status) {
    char more[96];
    std::snprintf(more, sizeof(more), ", cell_blocks %d, shared keys %d, workspace %lld bytes", params.cell_blocks,
                  params.shared_seqlen_k, static_cast<long long>(params.workspace_bytes));
    return report.fail(step, status, more);
  };
  static PreparedKernel prepared;
  KernelLimits limits;
  if (prepared.prepare(decode_kernel<Traits>, Traits::kThreads, report, limits)) return 1;
  // CTAs that run at once.
  const int fitting = limits.multiprocessors * std::max(1, std::min(limits.resident, Traits::kMinBlocks));

  if (params.head_dim > Traits::kHeadDimK || params.head_dim_v > Traits::kHeadDim) {
    return fail("head_dim", cudaErrorInvalidValue);
  }
  DecodeParams decode = make_decode_params(params, Traits::kTileCost);
  const int ctas = params.max_blocks > 0 ? std::min(params.max_blocks, fitting) : fitting;
  const WorkspacePlan plan = plan_workspace(params, Traits::kTileM, ctas);
  if (plan.tiles == 0) return 0;
  // Packed q without a token has no address. Calls with shared keys have no qv.
  if (Traits::kWithQv && ((params.qv == nullptr && params.total_q > 0) || params.shared_seqlen_k > 0)) {
    return fail("qv", cudaErrorInvalidValue);
  }
  if (params.shared_seqlen_k > 0 && !shared_keys_fit(params)) return fail("shared keys", cudaErrorInvalidValue);
  if (plan.rows > 0x7fffff00LL || plan.all_tiles > 0x7fffffffLL) return fail("grid", cudaErrorInvalidValue);
  if (params.cell_blocks > 0) {
    // The binding counts in units of kSplitUnitTokens keys, the kernel in n_blocks.
    decode.cell_blocks = params.cell_blocks * (kSplitUnitTokens / Traits::kTileN);
  } else if (params.num_splits == 1) {
    decode.cell_blocks = 1 << 30;  // a tile is a single split
  }
  const Workspace workspace = plan.place(params);
  if (plan.bytes > 0 && (params.out_partial == nullptr || params.workspace_bytes < plan.bytes)) {
    return fail("workspace", cudaErrorInvalidValue);
  }
  const bool dependent = limits.dependent_launch;
  const LaunchShape shape{
      .grid = dim3(ctas), .threads = Traits::kThreads, .smem_bytes = kSmemBytes, .dependent = dependent};
  if (const cudaError_t status = launch_kernel(decode_kernel<Traits>, shape, stream, decode, workspace)) {
    return fail("launch", status);
  }
  if (plan.merged == 0) return 0;
  const dim3 grid(static_cast<unsigned>(plan.merged), plan.tile_rows);
  constexpr bool kKvIsBf16 = std::is_same_v<typename Traits::KvElement, cutlass::bfloat16_t>;
  const bool out_is_bf16 = Traits::k8Bit ? params.q_dtype != DataType::kFloat16 : kKvIsBf16;
  const auto combine = out_is_bf16
                           ? combine_kernel<cutlass::bfloat16_t, Traits::kTileM, Traits::kTileN, Traits::kHeadDim>
                           : combine_kernel<cutlass::half_t, Traits::kTileM, Traits::kTileN, Traits::kHeadDim>;
  const cudaError_t status = launch_kernel(
      combine, {.grid = grid, .threads = 32 * kCombineWarps, .dependent = dependent}, stream, decode, workspace);
  return status == cudaSuccess ? 0 : fail("combine", status);
}

}  // namespace broadhead::decode
