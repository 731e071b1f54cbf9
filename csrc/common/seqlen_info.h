// Where sequence b lies in q and in k/v, and how long it is: the only reader of cu_seqlens, seqused and leftpad.
#pragma once

#include "common/attention_mask.h"
#include "common/macros.h"
#include "common/math.h"
#include "host/params.h"

namespace broadhead {

// The KV head of head `head` of the grid.
template <class Params>
BROADHEAD_HOST_DEVICE int kv_head_of(const Params& params, int head) {
  return params.heads_per_kv == 1 ? head : head / params.heads_per_kv;
}

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

// Whether the call gives masks as values. Most calls do not.
template <class Params>
BROADHEAD_HOST_DEVICE bool gives_masks(const Params& params) {
  return __builtin_expect(params.sequence_masks != nullptr, 0);
}

// Keys that every query of a sequence of `seqlen_k` keys sees.
template <class Params>
BROADHEAD_HOST_DEVICE int sequence_prefix(const Params& params, int batch, int seqlen_k) {
  return params.prefix_lens ? clamp_int(params.prefix_lens[batch], 0, seqlen_k) : 0;
}

}  // namespace broadhead
