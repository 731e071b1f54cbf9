// D of each query for the backward kernels, and the gradients of the sinks.
//
// With P = exp(S - LSE) the gradient of S is P (dP - D), where D = rowsum(dO O) - dLSE. A sink is a score without a
// value, so that its dP is 0: its gradient is the sum of -exp(sink - LSE) D over the queries of its head. Each CTA adds
// up those of its queries, a second kernel those of a head: the order is the same in every run.
#include "kernels/backward_prepare.h"

#include "common/math.h"
#include "common/seqlen_info.h"
#include "common/vector.h"
#include "common/warp.h"

namespace broadhead {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQueries = 64;  // of a CTA
constexpr int kElements = 8;  // that a lane takes at a time

int query_blocks(const AttnBwdParams& params) { return ceil_div(params.seqlen_q, kQueries); }

template <class T>
BROADHEAD_DEVICE float load_sink(const AttnBwdParams& params, int head) {
  if (params.sinks_are_fp32) return static_cast<const float*>(params.sinks)[head];
  return to_fp32(T{}, static_cast<const unsigned short*>(params.sinks)[head]);
}

// kLanes lanes a query. PERF(H200, 2 x 8192 tokens, 8 heads of 64: 35 -> 13 us): all loads of kAtOnce queries are on
// their way together. Partial sums of dsinks: [Hq, batch * query blocks].
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    prepare_kernel(const __grid_constant__ AttnBwdParams params, float* partial_dsinks) {
  constexpr int kSideBySide = kThreads / kLanes;
  constexpr int kAtOnce = min_int(kQueries / kSideBySide, 4);
  const int head = blockIdx.y, batch = blockIdx.z;
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  const int begin = blockIdx.x * kQueries, end = min_int(begin + kQueries, seqlen.seqlen_q);
  const T* out = static_cast<const T*>(params.out) + seqlen.batch_q * params.out_strides.batch +
                 seqlen.row_q * params.out_strides.row + head * params.out_strides.head;
  const T* dout = static_cast<const T*>(params.dout) + seqlen.batch_q * params.dout_strides.batch +
                  seqlen.row_q * params.dout_strides.row + head * params.dout_strides.head;
  const float* lses =
      params.softmax_lse + seqlen.batch_q * params.lse_batch_stride + head * params.lse_head_stride + seqlen.row_q;
  const float* dlses = params.dlse;
  if (dlses != nullptr) {
    dlses += seqlen.batch_q * params.dlse_batch_stride + head * params.dlse_head_stride + seqlen.row_q;
  }
  float* delta =
      params.delta + head * params.total_q + seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q;
  float dsink = 0.f;
  for (int first = begin; first < end; first += kAtOnce * kSideBySide) {
    // Past the end the last query is read again, and not written.
    const auto query_of = [&](int i) { return min_int(first + i * kSideBySide + group, end - 1); };
    float sum[kAtOnce], lse[kAtOnce], dlse[kAtOnce];
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      sum[i] = 0.f;
      lse[i] = lses[query_of(i)];
      dlse[i] = dlses != nullptr ? dlses[query_of(i)] : 0.f;
    }
    for (int col = lane * kElements; col < params.head_dim_v; col += kLanes * kElements) {
      Vector<T, kElements> a[kAtOnce], b[kAtOnce];
      BROADHEAD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        a[i] = load_vector<kElements>(out + query_of(i) * params.out_strides.row + col);
        b[i] = load_vector<kElements>(dout + query_of(i) * params.dout_strides.row + col);
      }
      BROADHEAD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        float x[kElements], y[kElements];
        unpack(a[i], x);
        unpack(b[i], y);
        BROADHEAD_UNROLL
        for (int j = 0; j < kElements; ++j) sum[i] = fmaf(x[j], y[j], sum[i]);
      }
    }
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      sum[i] = warp_sum<kLanes>(sum[i]);
      const int query = first + i * kSideBySide + group;
      if (lane != 0 || query >= end) continue;
      // A row without a gradient may hold anything.
      const float d = lse[i] == -INFINITY ? 0.f : sum[i] - dlse[i];
      delta[query] = d;
      if (partial_dsinks != nullptr && lse[i] != -INFINITY) dsink -= expf(load_sink<T>(params, head) - lse[i]) * d;
    }
  }
  if (partial_dsinks == nullptr) return;
  __shared__ float of_warp[kWarps];
  dsink = warp_sum(dsink);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = dsink;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.f;
  BROADHEAD_UNROLL
  for (int i = 0; i < kWarps; ++i) sum += of_warp[i];
  partial_dsinks[(static_cast<std::int64_t>(head) * gridDim.z + batch) * gridDim.x + blockIdx.x] = sum;
}

template <class T>
void start_prepare(const AttnBwdParams& params, dim3 grid, float* partial_dsinks, cudaStream_t stream) {
  if (params.head_dim_v <= 8 * kElements) {
    prepare_kernel<T, 8><<<grid, kThreads, 0, stream>>>(params, partial_dsinks);
  } else if (params.head_dim_v <= 16 * kElements) {
    prepare_kernel<T, 16><<<grid, kThreads, 0, stream>>>(params, partial_dsinks);
  } else {
    prepare_kernel<T, 32><<<grid, kThreads, 0, stream>>>(params, partial_dsinks);
  }
}

__global__ void __launch_bounds__(32) add_dsinks(const float* partial, int count, float* dsinks) {
  const float* of_head = partial + static_cast<std::int64_t>(blockIdx.x) * count;
  float sum = 0.f;
  for (int i = threadIdx.x; i < count; i += 32) sum += of_head[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) dsinks[blockIdx.x] = sum;
}

}  // namespace

std::int64_t backward_prepare_bytes(const AttnBwdParams& params) {
  if (params.sinks == nullptr) return 0;
  return static_cast<std::int64_t>(params.num_heads_q) * params.batch * query_blocks(params) * sizeof(float);
}

int launch_backward_prepare(const AttnBwdParams& params, bool is_bf16, float* scratch, cudaStream_t stream) {
  const dim3 grid(query_blocks(params), params.num_heads_q, params.batch);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {  // no query
    return params.dsinks ? cudaMemsetAsync(params.dsinks, 0, params.num_heads_q * sizeof(float), stream) : cudaSuccess;
  }
  float* partial = params.dsinks != nullptr ? scratch : nullptr;
  if (is_bf16) {
    start_prepare<__nv_bfloat16>(params, grid, partial, stream);
  } else {
    start_prepare<__half>(params, grid, partial, stream);
  }
  if (const cudaError_t status = cudaGetLastError()) return status;
  if (partial == nullptr) return cudaSuccess;
  add_dsinks<<<params.num_heads_q, 32, 0, stream>>>(partial, static_cast<int>(grid.x * grid.z), params.dsinks);
  return cudaGetLastError();
}

}  // namespace broadhead
