// Where sequence b lies in q and in k/v, how long it is, and which masks it has: the only reader of cu_seqlens,
// seqused, leftpad and of what masks the call gives as values.
#pragma once

#include "common/attention_mask.h"
#include "common/macros.h"
#include "common/math.h"
#include "host/params.h"

namespace broadhead {

struct SeqlenInfo {
  std::int64_t row_q;  // first row of the sequence: in its batch row (dense: 0) or in the packed tensor
  std::int64_t row_k;  // likewise for keys, past the left padding; a logical row of the page table when paged
  int seqlen_q;
  int seqlen_k;
  int batch_q;  // multiplies q_strides.batch (0 when packed)
  int batch_k;  // multiplies k_strides.batch, or page_table_batch_stride when paged (0 when packed)
};

struct RowSpan {
  int begin;
  int rows;
};

// Rows of sequence `batch` among the `total` packed rows that there are.
BROADHEAD_HOST_DEVICE RowSpan packed_rows(const std::int32_t* cu_seqlens, int batch, std::int64_t total) {
  const int most = total < INT32_MAX ? static_cast<int>(total) : INT32_MAX;
  const int begin = clamp_int(cu_seqlens[batch], 0, most);
  return {begin, max_int(0, clamp_int(cu_seqlens[batch + 1], 0, most) - begin)};
}

// The host sees none of these values. Whatever they are, and whatever another stream makes of them meanwhile, the
// result lies within the tensors: lengths are clamped to what these hold, offsets to the rows that exist, and there is
// no key behind a batch index that is out of range. Rows of q from max_seqlen_q on are as those past seqused_q.

// Where the queries of sequence `batch` lie. `params`: of either direction.
template <class Params>
BROADHEAD_HOST_DEVICE void locate_queries(const Params& params, int batch, SeqlenInfo& info) {
  int capacity_q = params.seqlen_q;
  info.row_q = 0;
  info.batch_q = batch;
  if (params.cu_seqlens_q) {
    const RowSpan rows = packed_rows(params.cu_seqlens_q, batch, params.total_q);
    info.row_q = rows.begin;
    capacity_q = min_int(rows.rows, capacity_q);
    info.batch_q = 0;
  }
  info.seqlen_q = params.seqused_q ? clamp_int(params.seqused_q[batch], 0, capacity_q) : capacity_q;
}

// Where its keys lie. `capacity_k`: the keys that row `batch_k` of dense k has.
template <class Params>
BROADHEAD_HOST_DEVICE void locate_keys(const Params& params, int batch, int batch_k, int capacity_k, SeqlenInfo& info) {
  info.row_k = 0;
  info.batch_k = batch_k;
  if (params.cu_seqlens_k) {
    const RowSpan rows = packed_rows(params.cu_seqlens_k, batch, params.total_k);
    info.row_k = rows.begin;
    capacity_k = rows.rows;
    info.batch_k = 0;
  }
  info.seqlen_k = params.seqused_k ? clamp_int(params.seqused_k[batch], 0, capacity_k) : capacity_k;
}

BROADHEAD_HOST_DEVICE SeqlenInfo make_seqlen_info(const AttnParams& params, int batch) {
  SeqlenInfo info;
  locate_queries(params, batch, info);
  int batch_k = batch, capacity_k = params.seqlen_k;
  if (params.kv_batch_idx) {
    batch_k = params.kv_batch_idx[batch];
    if (batch_k < 0 || batch_k >= params.num_kv_batches) batch_k = capacity_k = 0;
  }
  locate_keys(params, batch, batch_k, capacity_k, info);
  if (params.leftpad_k) {
    const int leftpad = clamp_int(params.leftpad_k[batch], 0, info.seqlen_k);
    info.row_k += leftpad;
    info.seqlen_k -= leftpad;
  }
  return info;
}

BROADHEAD_HOST_DEVICE SeqlenInfo make_seqlen_info(const AttnBwdParams& params, int batch) {
  SeqlenInfo info;
  locate_queries(params, batch, info);
  locate_keys(params, batch, batch, params.seqlen_k, info);
  return info;
}

// Whether the pool has page `page`. Nothing behind an id that it does not have is read: its K and V are zeros.
BROADHEAD_HOST_DEVICE bool page_exists(const AttnParams& params, int page) {
  return static_cast<unsigned>(page) < static_cast<unsigned>(params.num_pages);
}

// Whether sequence `batch` is causal by the tensor that says so for each sequence.
BROADHEAD_HOST_DEVICE bool is_causal(const MaskValues& values, int batch) {
  if (values.causal_by_sequence == nullptr) return false;
  return values.causal_is_bool != 0 ? static_cast<const std::uint8_t*>(values.causal_by_sequence)[batch] != 0
                                    : static_cast<const std::int32_t*>(values.causal_by_sequence)[batch] != 0;
}

// The rule of sequence `batch`.
template <class Params>
BROADHEAD_HOST_DEVICE MaskRule sequence_rule(const Params& params, int batch) {
  MaskRule rule = params.mask_rule;
  if (is_causal(params.mask_values, batch)) rule.window_right = 0;
  return rule;
}

// Where the extents of a sequence begin among those of all; each counts from its sequence's first query or key on.
// Sequences have none in common unless packed offsets go back, which the contract excludes for such masks.
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t first_query_extent(const Params& params, const SeqlenInfo& seqlen, int batch) {
  const std::int64_t first_row = seqlen.row_q + static_cast<std::int64_t>(seqlen.batch_q) * params.seqlen_q;
  return first_row / kExtentQueries + batch;
}
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t num_query_extents(const Params& params) {
  return params.total_q / kExtentQueries + params.batch + 1;
}
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t first_key_extent(const Params& params, const SeqlenInfo& seqlen, int batch) {
  if (params.cu_seqlens_k != nullptr) return seqlen.row_k / kExtentKeys + batch;
  return static_cast<std::int64_t>(ceil_div(params.seqlen_k, kExtentKeys)) * batch;
}
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t num_key_extents(const Params& params) {
  if (params.cu_seqlens_k != nullptr) return params.total_k / kExtentKeys + params.batch + 1;
  return static_cast<std::int64_t>(ceil_div(params.seqlen_k, kExtentKeys)) * params.batch;
}
// Bytes in front of the extents of keys: those of queries.
template <class Params>
BROADHEAD_HOST_DEVICE std::int64_t key_extent_offset(const Params& params) {
  return params.mask_values.query_ranges == nullptr ? 0 : num_query_extents(params) * std::int64_t{sizeof(KeyInterval)};
}

// Sets the mask of sequence `batch` that is given as values. `seqlen`: of the same sequence.
template <class Params>
BROADHEAD_HOST_DEVICE void set_given(const Params& params, const SeqlenInfo& seqlen, AttentionMask& mask) {
  const MaskValues& values = params.mask_values;
  mask.kind = Given::kNone;
  mask.tree_keys = 0;
  if (values.query_ranges != nullptr) {
    mask.kind = values.ranges_in_window != 0 ? Given::kRangesInWindow : Given::kRanges;
    mask.given =
        values.query_ranges + seqlen.batch_q * values.ranges_batch_stride + seqlen.row_q * values.ranges_row_stride;
    mask.given_stride = values.ranges_row_stride;
  } else if (values.tree_mask != nullptr) {
    mask.kind = Given::kTree;
    mask.tree_keys = kTreeKeys;
    mask.given = values.tree_mask + seqlen.batch_q * values.tree_batch_stride + seqlen.row_q * values.tree_row_stride;
    mask.given_stride = values.tree_row_stride;
  }
}

// Its extents.
template <class Params>
BROADHEAD_HOST_DEVICE MaskExtents sequence_extents(const Params& params, const SeqlenInfo& seqlen, int batch) {
  const MaskValues& values = params.mask_values;
  MaskExtents extents;
  if (values.query_extents != nullptr) {
    extents.of_queries =
        reinterpret_cast<const KeyInterval*>(values.query_extents) + first_query_extent(params, seqlen, batch);
  }
  if (values.key_extents != nullptr) {
    extents.of_keys = reinterpret_cast<const KeyExtent*>(values.key_extents) + first_key_extent(params, seqlen, batch);
  }
  return extents;
}

// Keys that every query of a sequence of `seqlen_k` keys sees.
template <class Params>
BROADHEAD_HOST_DEVICE int sequence_prefix(const Params& params, int batch, int seqlen_k) {
  return params.prefix_lens ? clamp_int(params.prefix_lens[batch], 0, seqlen_k) : 0;
}

}  // namespace broadhead
