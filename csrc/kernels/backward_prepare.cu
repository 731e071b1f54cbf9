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

// Partial sums of dsinks: [Hq, batch * query blocks].
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    prepare_kernel(const __grid_constant__ AttnBwdParams params, float* partial_dsinks) {
  const int head = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  const int end = min_int((blockIdx.x + 1) * kQueries, seqlen.seqlen_q);
  const T* out =
      static_cast<const T*>(params.out) + seqlen.batch_q * params.out_strides.batch + head * params.out_strides.head;
  const T* dout =
      static_cast<const T*>(params.dout) + seqlen.batch_q * params.dout_strides.batch + head * params.dout_strides.head;
  const float* lses =
      params.softmax_lse + seqlen.batch_q * params.lse_batch_stride + head * params.lse_head_stride + seqlen.row_q;
  const float* dlse = params.dlse;
  if (dlse != nullptr) {
    dlse += seqlen.batch_q * params.dlse_batch_stride + head * params.dlse_head_stride + seqlen.row_q;
  }
  float* delta =
      params.delta + head * params.total_q + seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q;
  float dsink = 0.f;
  for (int query = blockIdx.x * kQueries + warp; query < end; query += kWarps) {
    const std::int64_t row = seqlen.row_q + query;
    float sum = 0.f;
    for (int col = lane * kElements; col < params.head_dim_v; col += 32 * kElements) {
      float a[kElements], b[kElements];
      unpack(load_vector<kElements>(out + row * params.out_strides.row + col), a);
      unpack(load_vector<kElements>(dout + row * params.dout_strides.row + col), b);
      BROADHEAD_UNROLL
      for (int i = 0; i < kElements; ++i) sum = fmaf(a[i], b[i], sum);
    }
    sum = warp_sum(sum);
    if (lane != 0) continue;
    if (dlse != nullptr) sum -= dlse[query];
    const float lse = lses[query];
    if (lse == -INFINITY) sum = 0.f;  // a row without a gradient may hold anything
    delta[query] = sum;
    if (partial_dsinks == nullptr) continue;
    if (lse != -INFINITY) dsink -= expf(load_sink<T>(params, head) - lse) * sum;
  }
  if (partial_dsinks == nullptr) return;
  __shared__ float of_warp[kWarps];
  if (lane == 0) of_warp[warp] = dsink;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.f;
  BROADHEAD_UNROLL
  for (int i = 0; i < kWarps; ++i) sum += of_warp[i];
  partial_dsinks[(static_cast<std::int64_t>(head) * gridDim.z + batch) * gridDim.x + blockIdx.x] = sum;
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
    prepare_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(params, partial);
  } else {
    prepare_kernel<__half><<<grid, kThreads, 0, stream>>>(params, partial);
  }
  if (const cudaError_t status = cudaGetLastError()) return status;
  if (partial == nullptr) return cudaSuccess;
  add_dsinks<<<params.num_heads_q, 32, 0, stream>>>(partial, static_cast<int>(grid.x * grid.z), params.dsinks);
  return cudaGetLastError();
}

}  // namespace broadhead
