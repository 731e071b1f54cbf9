// The extents of the masks that a call gives as values.
#include "kernels/mask_extents.h"

#include <algorithm>
#include <climits>

#include "host/launch.cuh"

namespace broadhead {
namespace {

constexpr int kThreads = 256;
constexpr int kSpanExtents = 8;  // of keys, that a CTA works on at a time
constexpr int kSpanKeys = kSpanExtents * kExtentKeys;
constexpr int kMostCtas = 2048;  // of all sequences, but for one of each

// Extents of queries: 16 lanes for each.
BROADHEAD_DEVICE void find_query_extents(const AttentionMask& mask, KeyInterval* extents) {
  const int extents_at_once = kThreads / kExtentQueries * gridDim.x;
  const int own = blockIdx.x * (kThreads / kExtentQueries) + threadIdx.x / kExtentQueries;
  const int count = ceil_div(mask.seqlen_q, kExtentQueries);
  // All lanes of a warp go through the loop together.
  for (int first = 0; first < count; first += extents_at_once) {
    const int query = (first + own) * kExtentQueries + static_cast<int>(threadIdx.x) % kExtentQueries;
    const KeyInterval range = query < mask.seqlen_q ? mask.row_range(query) : KeyInterval{0, 0};
    const bool some = range.end > range.begin;
    int begin = some ? range.begin : INT_MAX, end = some ? range.end : 0;
    BROADHEAD_UNROLL
    for (int lanes = kExtentQueries / 2; lanes > 0; lanes /= 2) {
      begin = min_int(begin, __shfl_xor_sync(0xffffffffu, begin, lanes));
      end = max_int(end, __shfl_xor_sync(0xffffffffu, end, lanes));
    }
    if (threadIdx.x % kExtentQueries == 0 && first + own < count) {
      extents[first + own] = {begin < end ? begin : 0, end};
    }
  }
}

// Extents of the keys from `first_key` on: every thread takes some queries.
BROADHEAD_DEVICE void find_key_extents(const AttentionMask& mask, int first_key, KeyExtent (&found)[kSpanExtents]) {
  for (int query = threadIdx.x; query < mask.seqlen_q; query += kThreads) {
    const KeyInterval range = mask.row_range(query);
    const int begin = max_int(range.begin, first_key);
    const int end = min_int(range.end, first_key + kSpanKeys);
    for (int i = (begin - first_key) / kExtentKeys; begin < end && i * kExtentKeys < end - first_key; ++i) {
      const int key = first_key + i * kExtentKeys;
      atomicOr(&found[i].live, bits_between(begin - key, end - key));
      atomicMin(&found[i].q_begin, query);
      atomicMax(&found[i].q_end, query + 1);
    }
    for (int i = 0; mask.kind == Given::kTree && i < kSpanExtents; ++i) {
      const std::uint32_t seen = mask.given_word(query, first_key + i * kExtentKeys);
      if (seen != 0) atomicOr(&found[i].live, seen);
    }
  }
}

template <class Params>
__global__ void __launch_bounds__(kThreads) mask_extents_kernel(const __grid_constant__ Params params) {
  __shared__ KeyExtent found[kSpanExtents];
  __shared__ SeqlenInfo
      lengths;  // read once: another stream may change them, and all threads go through the same loops
  for (int batch = blockIdx.y; batch < params.batch; batch += gridDim.y) {
    __syncthreads();
    if (threadIdx.x == 0) lengths = make_seqlen_info(params, batch);
    __syncthreads();
    const SeqlenInfo seqlen = lengths;
    AttentionMask mask{seqlen.seqlen_q, seqlen.seqlen_k, sequence_rule(params, batch), 0};
    set_given(params, seqlen, mask);
    const MaskExtents all = sequence_extents(params, seqlen, batch);
    if (all.of_queries != nullptr) find_query_extents(mask, const_cast<KeyInterval*>(all.of_queries));
    KeyExtent* const extents = const_cast<KeyExtent*>(all.of_keys);
    // A tree speaks for the last keys alone, and nobody reads the extents of others.
    const int begin = mask.kind == Given::kTree ? max_int(0, seqlen.seqlen_k - kTreeKeys) / kSpanKeys * kSpanKeys : 0;
    for (int first_key = begin + blockIdx.x * kSpanKeys; first_key < seqlen.seqlen_k;
         first_key += gridDim.x * kSpanKeys) {
      if (threadIdx.x < kSpanExtents) found[threadIdx.x] = {0, INT_MAX, 0};
      __syncthreads();
      find_key_extents(mask, first_key, found);
      __syncthreads();
      const int at = first_key / kExtentKeys + static_cast<int>(threadIdx.x);
      if (threadIdx.x < kSpanExtents && at < ceil_div(seqlen.seqlen_k, kExtentKeys)) extents[at] = found[threadIdx.x];
      __syncthreads();
    }
  }
}

template <class Params>
int launch(Params& params, void* workspace, CUstream_st* stream) {
  char* const bytes = static_cast<char*>(workspace);
  MaskValues& values = params.mask_values;
  values.key_extents = reinterpret_cast<const std::int32_t*>(bytes + key_extent_offset(params));
  values.query_extents = values.query_ranges != nullptr ? reinterpret_cast<const std::int32_t*>(bytes) : nullptr;
  if (params.batch == 0) return cudaSuccess;
  const int spans = values.query_ranges == nullptr
                        ? 1
                        : std::max(ceil_div(params.seqlen_k, kSpanKeys), ceil_div(params.seqlen_q, kThreads));
  const dim3 grid(std::clamp(spans, 1, std::max(1, kMostCtas / params.batch)), std::min(params.batch, 65535));
  return launch_kernel(mask_extents_kernel<Params>, {.grid = grid, .threads = kThreads}, stream, params);
}

}  // namespace

int launch_mask_extents(AttnParams& params, void* workspace, CUstream_st* stream) {
  return launch(params, workspace, stream);
}

int launch_mask_extents(AttnBwdParams& params, void* workspace, CUstream_st* stream) {
  return launch(params, workspace, stream);
}

}  // namespace broadhead
