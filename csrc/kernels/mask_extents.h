// The step in front of a kernel whose call gives masks as values. It works out what each sequence is given
// (SequenceMask), what the ranges of neighbouring queries cover together, and which keys anybody sees by them. Kernels
// learn from it which n_blocks a tile visits, and which queries a tile of keys meets (given_interval, given_queries).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/seqlen_info.h"
#include "host/params.h"

struct CUstream_st;

namespace broadhead {

inline bool has_mask_values(const MaskValues& values) {
  return values.query_ranges != nullptr || values.tree_mask != nullptr || values.causal_by_sequence != nullptr;
}

// How the results lie in the workspace. Extents count from each sequence's first query or key on. Sequences have none
// in common unless packed offsets go back, which the contract excludes for such masks.
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t first_query_extent(const Params& params, const SeqlenInfo& seqlen, int batch) {
  const std::int64_t first_row = seqlen.row_q + static_cast<std::int64_t>(seqlen.batch_q) * params.seqlen_q;
  return first_row / kExtentQueries + batch;
}
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t first_key_extent(const Params& params, const SeqlenInfo& seqlen, int batch) {
  if (params.cu_seqlens_k != nullptr) return seqlen.row_k / kExtentKeys + batch;
  return static_cast<std::int64_t>(ceil_div(params.seqlen_k, kExtentKeys)) * batch;
}
template <class Params>
std::int64_t num_query_extents(const Params& params) {
  return params.mask_values.query_ranges == nullptr ? 0 : params.total_q / kExtentQueries + params.batch + 1;
}
template <class Params>
std::int64_t num_key_extents(const Params& params) {
  if (params.mask_values.query_ranges == nullptr && params.mask_values.tree_mask == nullptr) return 0;
  if (params.cu_seqlens_k != nullptr) return params.total_k / kExtentKeys + params.batch + 1;
  return static_cast<std::int64_t>(ceil_div(params.seqlen_k, kExtentKeys)) * params.batch;
}

// Bytes of the scratch, a multiple of 256; 0 where no mask is given. It is the first part of a call's workspace.
template <class Params>
std::int64_t mask_extent_bytes(const Params& params) {
  if (!has_mask_values(params.mask_values)) return 0;
  const std::int64_t bytes = params.batch * std::int64_t{sizeof(SequenceMask)} +
                             num_query_extents(params) * std::int64_t{sizeof(KeyInterval)} +
                             num_key_extents(params) * std::int64_t{sizeof(KeyExtent)};
  return (bytes + 255) / 256 * 256;
}

// What sequence `batch` is given, but for `within`. The extents: of all sequences.
template <class Params>
BROADHEAD_HOST_DEVICE SequenceMask make_sequence_mask(const Params& params, const SeqlenInfo& seqlen, int batch,
                                                      const KeyInterval* query_extents, const KeyExtent* key_extents) {
  const MaskValues& values = params.mask_values;
  SequenceMask mask{Given::kNone, 0, params.mask_rule.window_right, nullptr, 0, {0, 0}, {}};
  if (values.causal_by_sequence != nullptr) {
    const bool causal = values.causal_is_bool != 0
                            ? static_cast<const std::uint8_t*>(values.causal_by_sequence)[batch] != 0
                            : static_cast<const std::int32_t*>(values.causal_by_sequence)[batch] != 0;
    if (causal) mask.window_right = 0;
  }
  if (values.query_ranges != nullptr) {
    mask.kind = values.ranges_in_window != 0 ? Given::kRangesInWindow : Given::kRanges;
    mask.given =
        values.query_ranges + seqlen.batch_q * values.ranges_batch_stride + seqlen.row_q * values.ranges_row_stride;
    mask.given_stride = values.ranges_row_stride;
    mask.extents.of_queries = query_extents + first_query_extent(params, seqlen, batch);
  } else if (values.tree_mask != nullptr) {
    mask.kind = Given::kTree;
    mask.tree_keys = kTreeKeys;
    mask.given = values.tree_mask + seqlen.batch_q * values.tree_batch_stride + seqlen.row_q * values.tree_row_stride;
    mask.given_stride = values.tree_row_stride;
  } else {
    return mask;
  }
  mask.extents.of_keys = key_extents + first_key_extent(params, seqlen, batch);
  return mask;
}

// Sets the masks of the sequences, which lie in `workspace`, and launches what fills them. Returns a cudaError_t.
int launch_mask_extents(AttnParams& params, void* workspace, CUstream_st* stream);
int launch_mask_extents(AttnBwdParams& params, void* workspace, CUstream_st* stream);

}  // namespace broadhead
