// The kernel of merge_attn_states: out = w_a out_a + w_b out_b, where w_a = exp(lse_a - lse), w_b = exp(lse_b - lse)
// and lse = log(exp lse_a + exp lse_b).
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "common/math.h"
#include "common/vector.h"
#include "host/cuda_check.h"
#include "kernels/merge_states.h"

namespace broadhead {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpThreads = 32;
constexpr int kVectorBytes = 16;

BROADHEAD_DEVICE std::int64_t offset_of(const TensorStrides& strides, int batch, int row, int head) {
  return batch * strides.batch + row * strides.row + head * strides.head;
}

// `lanes` neighbouring threads, a power of two up to a warp, divide one row (token, head). `out` may be out_a or out_b,
// since each thread writes only what it alone has read.
template <class Element, int kVec>
__global__ void __launch_bounds__(kThreads)
    merge_states_kernel(const __grid_constant__ MergeStatesParams params, int lanes) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (index >= static_cast<std::int64_t>(params.batch) * params.seqlen * params.heads) return;
  const unsigned token = static_cast<unsigned>(index) / params.heads;
  const int head = static_cast<int>(static_cast<unsigned>(index) - token * params.heads);
  const int batch = static_cast<int>(token / params.seqlen);
  const int row = static_cast<int>(token - batch * static_cast<unsigned>(params.seqlen));

  const auto* out_a = static_cast<const Element*>(params.out_a) + offset_of(params.out_a_strides, batch, row, head);
  const auto* out_b = static_cast<const Element*>(params.out_b) + offset_of(params.out_b_strides, batch, row, head);
  auto* out = static_cast<Element*>(params.out) + offset_of(params.out_strides, batch, row, head);
  int column = (threadIdx.x % lanes) * kVec;
  if (column >= params.head_dim_v) return;
  auto bits_a = load_vector<kVec>(out_a + column), bits_b = load_vector<kVec>(out_b + column);

  const float lse_a = params.lse_a[offset_of(params.lse_a_strides, batch, row, head)];
  const float lse_b = params.lse_b[offset_of(params.lse_b_strides, batch, row, head)];
  const bool has_a = lse_a != -INFINITY, has_b = lse_b != -INFINITY;
  // fmaxf would drop a NaN.
  const float largest = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
  float weight_a = has_a ? expf(lse_a - largest) : 0.f;
  float weight_b = has_b ? expf(lse_b - largest) : 0.f;
  const float sum = weight_a + weight_b;
  const float inverse = has_a || has_b ? 1.f / sum : 0.f;
  if (column == 0) {
    const float lse = has_a || has_b ? largest + logf(sum) : -INFINITY;
    params.softmax_lse[offset_of(params.lse_strides, batch, row, head)] = lse;
  }
  weight_a *= inverse;
  weight_b *= inverse;

  while (true) {
    float a[kVec], b[kVec];
    unpack(bits_a, a);
    unpack(bits_b, b);
    // The next vectors are loaded before this one is stored: the compiler cannot know that they do not overlap.
    const int next = column + lanes * kVec;
    if (next < params.head_dim_v) {
      bits_a = load_vector<kVec>(out_a + next);
      bits_b = load_vector<kVec>(out_b + next);
    }
    BROADHEAD_UNROLL
    for (int i = 0; i < kVec; ++i) {
      // A part without keys may hold anything, NaN included.
      a[i] = (has_a ? weight_a * a[i] : 0.f) + (has_b ? weight_b * b[i] : 0.f);
    }
    store_vector(out + column, pack<Element>(a));
    if (next >= params.head_dim_v) break;
    column = next;
  }
}

bool vectors_fit(const MergeStatesParams& params, int count) {
  bool fit = params.head_dim_v % count == 0;
  for (const void* pointer : {params.out_a, params.out_b, static_cast<const void*>(params.out)}) {
    fit = fit && reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
  }
  for (const TensorStrides* strides : {&params.out_a_strides, &params.out_b_strides, &params.out_strides}) {
    fit = fit && strides->batch % count == 0 && strides->row % count == 0 && strides->head % count == 0;
  }
  return fit;
}

template <class Element>
cudaError_t launch(const MergeStatesParams& params, cudaStream_t stream) {
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(Element));
  const int vec = vectors_fit(params, kVec) ? kVec : 1;
  int lanes = 1;
  while (lanes < kWarpThreads && lanes * vec < params.head_dim_v) lanes *= 2;
  const std::int64_t rows = static_cast<std::int64_t>(params.batch) * params.seqlen * params.heads;
  const int rows_per_block = kThreads / lanes;
  const std::int64_t ctas = (rows + rows_per_block - 1) / rows_per_block;
  // The index of a row has 31 bits.
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  if (ctas == 0) return cudaSuccess;
  const auto kernel = vec == 1 ? merge_states_kernel<Element, 1> : merge_states_kernel<Element, kVec>;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(params, lanes);
  return cudaGetLastError();
}

}  // namespace

int launch_merge_states(const MergeStatesParams& params, CUstream_st* stream, char* error, std::size_t error_size) {
  const cudaError_t status = params.dtype == DataType::kFloat32    ? launch<float>(params, stream)
                             : params.dtype == DataType::kBFloat16 ? launch<__nv_bfloat16>(params, stream)
                             : params.dtype == DataType::kFloat16  ? launch<__half>(params, stream)
                                                                   : cudaErrorInvalidValue;
  char shape[128];
  std::snprintf(shape, sizeof(shape), "batch %d, seqlen %d, heads %d, head_dim_v %d", params.batch, params.seqlen,
                params.heads, params.head_dim_v);
  return check_cuda(status, "merge_states", "launch", shape, error, error_size);
}

}  // namespace broadhead
