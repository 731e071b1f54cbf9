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

// Adds the ranges of a warp's queries to the extents of the keys from `first_key` on. PERF: of a warp one lane adds, as
// the queries of an image have one range, and additions to one place wait for each other.
BROADHEAD_DEVICE void add_ranges(const KeyInterval& range, int query, int first_key, KeyExtent (&found)[kSpanExtents]) {
  const int begin = max_int(range.begin, first_key), end = min_int(range.end, first_key + kSpanKeys);
  if (!__any_sync(0xffffffffu, begin < end)) return;
#pragma unroll 1
  for (int i = 0; i < kSpanExtents; ++i) {
    const int key = first_key + i * kExtentKeys;
    const std::uint32_t seen = begin < end ? bits_between(begin - key, end - key) : 0;
    const std::uint32_t live = __reduce_or_sync(0xffffffffu, seen);
    if (live == 0) continue;
    const int q_begin = __reduce_min_sync(0xffffffffu, seen != 0 ? query : INT_MAX);
    const int q_end = __reduce_max_sync(0xffffffffu, seen != 0 ? query + 1 : 0);
    if (threadIdx.x % 32 != 0) continue;
    atomicOr(&found[i].live, live);
    atomicMin(&found[i].q_begin, q_begin);
    atomicMax(&found[i].q_end, q_end);
  }
}

// Extents of the keys from `first_key` on, by the ranges of all queries, and in `within` what all of these cover: every
// thread takes some. PERF: it reads several ranges before it looks at the first, or the latency of each would add up.
BROADHEAD_DEVICE void find_key_extents(const AttentionMask& mask, int first_key, KeyExtent (&found)[kSpanExtents],
                                       KeyInterval& within) {
  constexpr int kAtOnce = 8;
  int begin = INT_MAX, end = 0;
  for (int first = 0; first < mask.seqlen_q; first += kAtOnce * kThreads) {
    const int query = first + static_cast<int>(threadIdx.x);
    KeyInterval ranges[kAtOnce];
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) ranges[i] = mask.row_range(query + i * kThreads);
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (query + i * kThreads >= mask.seqlen_q) ranges[i] = {0, 0};
      if (ranges[i].begin < ranges[i].end) begin = min_int(begin, ranges[i].begin), end = max_int(end, ranges[i].end);
      add_ranges(ranges[i], query + i * kThreads, first_key, found);
    }
  }
  begin = __reduce_min_sync(0xffffffffu, begin);
  end = __reduce_max_sync(0xffffffffu, end);
  if (threadIdx.x % 32 == 0 && begin < end) {
    atomicMin(&within.begin, begin);
    atomicMax(&within.end, end);
  }
}

// Likewise by the tree_mask.
BROADHEAD_DEVICE void find_tree_extents(const AttentionMask& mask, int first_key, KeyExtent (&found)[kSpanExtents]) {
  for (int query = threadIdx.x; query < mask.seqlen_q; query += kThreads) {
    for (int i = 0; i < kSpanExtents; ++i) {
      const std::uint32_t seen = mask.given_word(query, first_key + i * kExtentKeys);
      if (seen != 0) atomicOr(&found[i].live, seen);
    }
  }
}

struct Results {
  SequenceMask* masks;
  KeyInterval* query_extents;
  KeyExtent* key_extents;
};

template <class Params>
__global__ void __launch_bounds__(kThreads, 1)
    mask_extents_kernel(const __grid_constant__ Params params, const Results results) {
  __shared__ KeyExtent found[kSpanExtents];
  // Read once: another stream may change the values, and all threads go through the same loops.
  __shared__ SeqlenInfo lengths;
  __shared__ SequenceMask sequence;
  for (int batch = blockIdx.y; batch < params.batch; batch += gridDim.y) {
    __syncthreads();
    if (threadIdx.x == 0) {
      lengths = make_seqlen_info(params, batch);
      sequence = make_sequence_mask(params, lengths, batch, results.query_extents, results.key_extents);
      sequence.within = {INT_MAX, 0};
    }
    __syncthreads();
    AttentionMask mask{lengths.seqlen_q, lengths.seqlen_k, params.mask_rule, 0};
    mask.give(sequence);
    if (sequence.extents.of_queries != nullptr) {
      find_query_extents(mask, const_cast<KeyInterval*>(sequence.extents.of_queries));
    }
    KeyExtent* const extents = const_cast<KeyExtent*>(sequence.extents.of_keys);
    const bool tree = mask.kind == Given::kTree;
    // A tree speaks for the last keys alone, and nobody reads the extents of others.
    const int begin = tree ? max_int(0, mask.seqlen_k - kTreeKeys) / kSpanKeys * kSpanKeys : 0;
    for (int first_key = begin + blockIdx.x * kSpanKeys; extents != nullptr && first_key < mask.seqlen_k;
         first_key += gridDim.x * kSpanKeys) {
      if (threadIdx.x < kSpanExtents) found[threadIdx.x] = {0, INT_MAX, 0};
      __syncthreads();
      if (tree) {
        find_tree_extents(mask, first_key, found);
      } else {
        find_key_extents(mask, first_key, found, sequence.within);
      }
      __syncthreads();
      const int at = first_key / kExtentKeys + static_cast<int>(threadIdx.x);
      if (threadIdx.x < kSpanExtents && at < ceil_div(mask.seqlen_k, kExtentKeys)) extents[at] = found[threadIdx.x];
      __syncthreads();
    }
    // The first CTA of a sequence has seen all of its ranges, if there are keys.
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      if (tree) sequence.within = {max_int(0, mask.seqlen_k - kTreeKeys), mask.seqlen_k};
      if (sequence.within.end == 0) sequence.within = {0, 0};
      results.masks[batch] = sequence;
    }
  }
}

template <class Params>
int launch(Params& params, void* workspace, CUstream_st* stream) {
  Results results;
  results.masks = static_cast<SequenceMask*>(workspace);
  results.query_extents = reinterpret_cast<KeyInterval*>(results.masks + params.batch);
  results.key_extents = reinterpret_cast<KeyExtent*>(results.query_extents + num_query_extents(params));
  params.sequence_masks = results.masks;
  if (params.batch == 0) return cudaSuccess;
  const int spans = params.mask_values.query_ranges == nullptr
                        ? 1
                        : std::max(ceil_div(params.seqlen_k, kSpanKeys), ceil_div(params.seqlen_q, kThreads));
  const dim3 grid(std::clamp(spans, 1, std::max(1, kMostCtas / params.batch)), std::min(params.batch, 65535));
  return launch_kernel(mask_extents_kernel<Params>, {.grid = grid, .threads = kThreads}, stream, params, results);
}

}  // namespace

int launch_mask_extents(AttnParams& params, void* workspace, CUstream_st* stream) {
  return launch(params, workspace, stream);
}

int launch_mask_extents(AttnBwdParams& params, void* workspace, CUstream_st* stream) {
  return launch(params, workspace, stream);
}

}  // namespace broadhead
