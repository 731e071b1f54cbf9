// The combine kernels of the prefill kernels and of flash_attn_combine: out = sum_s exp(lse_s - lse) out_s with
// lse = log sum_s exp(lse_s).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "common/dependent_launch.h"
#include "common/math.h"
#include "common/scheduler_metadata.h"
#include "common/seqlen_info.h"
#include "common/warp.h"
#include "host/cuda_check.h"
#include "host/launch.cuh"
#include "kernels/combine.h"

namespace broadhead {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxSplits = 128;
constexpr int kCols = 128;  // columns that a warp merges at a time, four a lane
// How many CTAs a split combine has. With a CTA for each row, most of a long grid would start only to find that its
// sequence has one split. PERF(H200, 64 x 8k, 16 query tokens, 16/2 heads of 256, one split each, GB/s: 3552 -> 3654,
// with the dependent launch)
constexpr int kMostBlocks = 2048;
// A CTA has few rows all the same: in a batch with one long sequence, all work is in the CTAs of that one.
constexpr int kMostRows = 8;
// Where there are fewer CTAs than this, several divide the columns of a row. It is four for each multiprocessor of a
// large device.
constexpr int kFewBlocks = 528;
// How many splits a thread reads before it adds the first.
constexpr int kAtOnce = 8;
// Up to this many splits a warp merges a row by itself.
constexpr int kWarpSplits = 8;

BROADHEAD_DEVICE void store4(float* target, float4 x) { *reinterpret_cast<float4*>(target) = x; }
BROADHEAD_DEVICE void store4(__nv_bfloat16* target, float4 x) {
  __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<uint2*>(pair);
}
BROADHEAD_DEVICE void store4(__half* target, float4 x) {
  __half2 pair[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<uint2*>(pair);
}

struct CombineShared {
  SeqlenInfo seqlen;  // the CTA's sequence
  int splits;
  float weight[kMaxSplits];
  float4 partial[kWarps][32];
};

// The columns that a CTA merges: every step-th kCols from the first on.
struct CombineColumns {
  int first;
  int step;
};

// One CTA merges columns of one row of one head. `lse_of(s)` and `out_of(s)` give the partials; `sink` is -inf when
// there is none.
template <class Element, class LseOf, class OutOf>
BROADHEAD_DEVICE void combine_row(CombineShared& smem, int splits, CombineColumns columns, int head_dim_v, float sink,
                                  LseOf lse_of, OutOf out_of, Element* out, float* lse_out) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (warp == 0) {
    float largest = -INFINITY;
    for (int s = lane; s < splits; s += 32) {
      const float lse = lse_of(s);
      smem.weight[s] = lse;
      largest = fmaxf(largest, lse);
    }
    largest = warp_max(largest);
    const float reference = largest == -INFINITY ? 0.f : fmaxf(largest, sink);
    float sum = 0.f;
    for (int s = lane; s < splits; s += 32) sum += expf(smem.weight[s] - reference);
    sum = warp_sum(sum);
    const bool empty = sum == 0.f;  // no visible key: out 0, LSE -inf, whatever the sink
    if (!empty && sink != -INFINITY) sum += expf(sink - reference);
    const float inverse = empty ? 0.f : 1.f / sum;
    for (int s = lane; s < splits; s += 32) smem.weight[s] = expf(smem.weight[s] - reference) * inverse;
    if (lane == 0 && lse_out != nullptr) *lse_out = empty ? -INFINITY : reference + logf(sum);
  }
  __syncthreads();
  for (int col0 = columns.first; col0 < head_dim_v; col0 += columns.step) {
    const int col = col0 + lane * 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (col < head_dim_v) {
      for (int first = warp; first < splits; first += kWarps * kAtOnce) {
        float weight[kAtOnce];
        float4 x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int s = first + i * kWarps;
          weight[i] = s < splits ? smem.weight[s] : 0.f;
          x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
          // The output of an empty split was never written.
          if (weight[i] != 0.f) x[i] = *reinterpret_cast<const float4*>(out_of(s) + col);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          sum.x += weight[i] * x[i].x;
          sum.y += weight[i] * x[i].y;
          sum.z += weight[i] * x[i].z;
          sum.w += weight[i] * x[i].w;
        }
      }
    }
    smem.partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && col < head_dim_v) {
      for (int w = 1; w < kWarps; ++w) {
        const float4 x = smem.partial[w][lane];
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
      }
      store4(out + col, sum);
    }
    __syncthreads();
  }
}

// One warp merges one row of at most kWarpSplits splits.
template <class Element, class LseOf, class OutOf>
BROADHEAD_DEVICE void combine_row_in_warp(int splits, CombineColumns columns, int head_dim_v, float sink, LseOf lse_of,
                                          OutOf out_of, Element* out, float* lse_out) {
  const int lane = threadIdx.x % 32;
  const float lse = lane < splits ? lse_of(lane) : -INFINITY;
  const float largest = warp_max(lse);
  const float reference = largest == -INFINITY ? 0.f : fmaxf(largest, sink);
  float weight = expf(lse - reference);
  float sum = warp_sum(weight);
  const bool empty = sum == 0.f;  // no visible key: out 0, LSE -inf, whatever the sink
  if (!empty && sink != -INFINITY) sum += expf(sink - reference);
  weight *= empty ? 0.f : 1.f / sum;
  if (lane == 0 && lse_out != nullptr) *lse_out = empty ? -INFINITY : reference + logf(sum);
  for (int col0 = columns.first; col0 < head_dim_v; col0 += columns.step) {
    const int col = col0 + lane * 4;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int s = 0; s < kWarpSplits; ++s) {
      if (s == splits) break;
      const float own = __shfl_sync(0xffffffffu, weight, s);
      if (own == 0.f || col >= head_dim_v) continue;  // the output of an empty split was never written
      const float4 x = *reinterpret_cast<const float4*>(out_of(s) + col);
      total.x += own * x.x;
      total.y += own * x.y;
      total.z += own * x.z;
      total.w += own * x.w;
    }
    if (col < head_dim_v) store4(out + col, total);
  }
}

BROADHEAD_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
BROADHEAD_DEVICE float to_float(__half x) { return __half2float(x); }

// CTA b merges rows (token, head) [c * rows_per_block, (c + 1) * rows_per_block) of a sequence, for c = b % chunks; the
// CTAs of y divide the columns.
template <class Element>
__global__ void __launch_bounds__(32 * kWarps)
    split_combine_kernel(const __grid_constant__ AttnParams params, int chunks, int rows_per_block) {
  __shared__ CombineShared smem;
  wait_for_predecessor();
  const int batch = blockIdx.x / chunks;
  // The lengths are read once for each CTA: another stream may change them, and the warps must agree.
  if (threadIdx.x == 0) {
    smem.splits = sequence_splits(params, batch);
    smem.seqlen = make_seqlen_info(params, batch);
  }
  __syncthreads();
  const int splits = smem.splits;
  if (splits == 1) return;
  const SeqlenInfo seqlen = smem.seqlen;
  const int first_row = blockIdx.x % chunks * rows_per_block;
  const int seqlen_q = min_int(seqlen.seqlen_q, params.seqlen_q);
  const int end_row = min_int(first_row + rows_per_block, seqlen_q * params.num_heads_q);
  const std::int64_t split_stride = params.num_heads_q * params.total_q;
  const CombineColumns columns{static_cast<int>(blockIdx.y) * kCols, static_cast<int>(gridDim.y) * kCols};
  const auto merge = [&](int query, const auto& merge_row) {
    const int token = query / params.num_heads_q;
    const int head = query - token * params.num_heads_q;
    const std::int64_t row = seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q + token;
    const std::int64_t first = head * params.total_q + row;
    float sink = -INFINITY;
    if (params.sinks != nullptr) {
      sink = params.sinks_are_fp32 ? static_cast<const float*>(params.sinks)[head]
                                   : to_float(static_cast<const Element*>(params.sinks)[head]);
    }
    merge_row(
        sink, [&](int s) { return params.lse_partial[s * split_stride + first]; },
        [&](int s) { return params.out_partial + (s * split_stride + first) * params.head_dim_v; },
        static_cast<Element*>(params.out) + seqlen.batch_q * params.out_strides.batch +
            (seqlen.row_q + token) * params.out_strides.row + head * params.out_strides.head,
        params.softmax_lse != nullptr && blockIdx.y == 0
            ? params.softmax_lse + seqlen.batch_q * params.lse_batch_stride + head * params.lse_head_stride +
                  seqlen.row_q + token
            : nullptr);
  };
  if (splits <= kWarpSplits) {
    for (int query = first_row + static_cast<int>(threadIdx.x) / 32; query < end_row; query += kWarps) {
      merge(query, [&](float sink, auto lse_of, auto out_of, Element* out, float* lse) {
        combine_row_in_warp(splits, columns, params.head_dim_v, sink, lse_of, out_of, out, lse);
      });
    }
  } else {
    for (int query = first_row; query < end_row; ++query) {
      merge(query, [&](float sink, auto lse_of, auto out_of, Element* out, float* lse) {
        combine_row(smem, splits, columns, params.head_dim_v, sink, lse_of, out_of, out, lse);
      });
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(32 * kWarps) combine_kernel(const __grid_constant__ CombineParams params) {
  __shared__ CombineShared smem;
  const std::int64_t row = blockIdx.x;
  const int head = blockIdx.y;
  combine_row(
      smem, params.num_splits, {0, kCols}, params.head_dim_v, -INFINITY,
      [&](int s) {
        return params.lse_partial[s * params.lse_partial_split_stride + row * params.lse_partial_row_stride +
                                  head * params.lse_partial_head_stride];
      },
      [&](int s) {
        return params.out_partial + s * params.out_partial_split_stride + row * params.out_partial_row_stride +
               head * params.out_partial_head_stride;
      },
      static_cast<Element*>(params.out) + row * params.out_row_stride + head * params.out_head_stride,
      params.softmax_lse ? params.softmax_lse + row * params.lse_row_stride + head * params.lse_head_stride : nullptr);
}

int report(const char* name, cudaError_t status, long long rows, int heads, int head_dim_v, int splits, char* error,
           std::size_t error_size) {
  char shape[128];
  std::snprintf(shape, sizeof(shape), "rows %lld, heads %d, head_dim_v %d, num_splits %d", rows, heads, head_dim_v,
                splits);
  return check_cuda(status, name, "launch", shape, error, error_size);
}

}  // namespace

int launch_split_combine(const AttnParams& params, bool is_bf16, bool dependent, CUstream_st* stream, char* error,
                         std::size_t error_size) {
  const long long rows = static_cast<long long>(params.seqlen_q) * params.num_heads_q;  // rows of a sequence
  const long long rows_per_block =
      std::clamp(rows * params.batch / kMostBlocks, 1ll, static_cast<long long>(kMostRows));
  const long long chunks = (rows + rows_per_block - 1) / rows_per_block;
  const unsigned sharing =
      chunks * params.batch < kFewBlocks ? static_cast<unsigned>(ceil_div(params.head_dim_v, kCols)) : 1;
  cudaError_t status = cudaErrorInvalidValue;  // a grid beyond 31 bits
  if (rows <= 0x7fffffffLL && chunks * params.batch <= 0x7fffffffLL && params.num_splits <= kMaxSplits) {
    const auto kernel = is_bf16 ? split_combine_kernel<__nv_bfloat16> : split_combine_kernel<__half>;
    const dim3 grid(static_cast<unsigned>(chunks * params.batch), sharing);
    status = launch_kernel(kernel, {.grid = grid, .threads = 32 * kWarps, .dependent = dependent}, stream, params,
                           static_cast<int>(chunks), static_cast<int>(rows_per_block));
  }
  return report("split_combine", status, rows * params.batch, 1, params.head_dim_v, params.num_splits, error,
                error_size);
}

int launch_combine(const CombineParams& params, CUstream_st* stream, char* error, std::size_t error_size) {
  if (params.num_splits < 1 || params.num_splits > kMaxSplits || params.rows > 0x7fffffffLL) {
    std::snprintf(error, error_size, "combine: num_splits must be in [1, %d] and rows fit 31 bits, got %d and %lld",
                  kMaxSplits, params.num_splits, static_cast<long long>(params.rows));
    return 1;
  }
  if (params.rows == 0 || params.heads == 0) return 0;
  const auto kernel = params.out_dtype == 0   ? combine_kernel<float>
                      : params.out_dtype == 1 ? combine_kernel<__nv_bfloat16>
                                              : combine_kernel<__half>;
  kernel<<<dim3(static_cast<unsigned>(params.rows), params.heads), 32 * kWarps, 0, stream>>>(params);
  return report("combine", cudaGetLastError(), params.rows, params.heads, params.head_dim_v, params.num_splits, error,
                error_size);
}

}  // namespace broadhead
