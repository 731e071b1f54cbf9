// The kernel of get_scheduler_metadata: one CTA chooses the split count of every sequence from the lengths on the
// device.
#include <cuda_runtime.h>

#include <climits>
#include <cstdio>

#include "common/attention_mask.h"
#include "common/seqlen_info.h"
#include "common/warp.h"
#include "host/cuda_check.h"
#include "kernels/scheduler_metadata.h"

namespace broadhead {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxKeys = 1 << 30;  // keys of a sequence, new ones included

struct Work {
  int tiles;     // m_blocks x heads
  int n_blocks;  // n_blocks of the longest tile
};

BROADHEAD_DEVICE Work sequence_work(const SchedulerMetadataParams& params, int batch) {
  AttnParams lengths{};
  lengths.seqlen_q = params.seqlen_q;
  lengths.seqlen_k = params.seqlen_k;
  lengths.cu_seqlens_q = params.cu_seqlens_q;
  lengths.cu_seqlens_k = params.cu_seqlens_k;
  lengths.seqused_q = params.seqused_q;
  lengths.seqused_k = params.seqused_k;
  lengths.leftpad_k = params.leftpad_k;
  lengths.total_q = lengths.total_k = INT32_MAX;  // the request does not tell
  SeqlenInfo info = make_seqlen_info(lengths, batch);
  info.seqlen_k = min_int(info.seqlen_k, kMaxKeys - params.seqlen_k_new) + params.seqlen_k_new;
  if (info.seqlen_q == 0) return {0, 0};
  const MaskRule rule{params.window_left, params.window_right, params.attention_chunk};
  const AttentionMask mask{info.seqlen_q, info.seqlen_k, rule, 0};
  const BlockRange range = block_range(mask, 0, info.seqlen_q - 1, params.tile_n, {0, 0});
  return {ceil_div(info.seqlen_q * params.rows_per_token, params.tile_m) * params.heads_in_grid,
          range.end - range.begin};
}

BROADHEAD_DEVICE long long cta_sum(long long x, long long* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < kThreads / 32; ++i) x += scratch[i];
  return x;
}

BROADHEAD_DEVICE int cta_max(int x, long long* scratch) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) x = max_int(x, static_cast<int>(scratch[i]));
  return x;
}

__global__ void __launch_bounds__(kThreads) metadata_kernel(const __grid_constant__ SchedulerMetadataParams params) {
  __shared__ long long scratch[kThreads / 32];
  const int slots = round_up(params.batch, 4);

  long long n_blocks = 0;
  int longest = 1;
  for (int b = threadIdx.x; b < params.batch; b += kThreads) {
    const Work work = sequence_work(params, b);
    n_blocks += static_cast<long long>(work.tiles) * work.n_blocks;
    longest = max_int(longest, work.n_blocks);
  }
  n_blocks = cta_sum(n_blocks, scratch);
  longest = cta_max(longest, scratch);

  // Try every number of splits of the longest sequence; each fixes how many n_blocks a split has in all sequences.
  int best_size = longest;
  int best_cost = INT_MAX;
  const int candidates = min_int(params.num_splits, longest);
  for (int n = 1; n <= candidates; ++n) {
    const int size = ceil_div(longest, n);
    if (n > 1 && size == ceil_div(longest, n - 1)) continue;
    long long splits = 0;
    for (int b = threadIdx.x; b < params.batch; b += kThreads) {
      const Work work = sequence_work(params, b);
      splits += static_cast<long long>(work.tiles) * max_int(1, ceil_div(work.n_blocks, size));
    }
    splits = cta_sum(splits, scratch);
    const int cost = split_cost(splits, n_blocks, size, params.target_ctas);
    if (cost < best_cost) {
      best_cost = cost;
      best_size = size;
    }
  }

  for (int i = threadIdx.x; i < 4 * slots + 1; i += kThreads) {
    int value = 0;
    if (i < params.batch) {
      value = max_int(1, min_int(params.num_splits, ceil_div(sequence_work(params, i).n_blocks, best_size)));
    } else if (i >= slots && i < slots + params.batch) {
      value = params.metadata_tag;
    }
    params.metadata[i] = value;
  }
}

}  // namespace

int launch_scheduler_metadata(const SchedulerMetadataParams& params, CUstream_st* stream, char* error,
                              std::size_t error_size) {
  metadata_kernel<<<1, kThreads, 0, stream>>>(params);
  char shape[128];
  std::snprintf(shape, sizeof(shape), "batch %d, seqlen_q %d, seqlen_k %d", params.batch, params.seqlen_q,
                params.seqlen_k);
  return check_cuda(cudaGetLastError(), "scheduler_metadata", "launch", shape, error, error_size);
}

}  // namespace broadhead
