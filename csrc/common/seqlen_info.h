// Where sequence b lies in q and in k/v, and how long it is: the only reader of cu_seqlens, seqused and leftpad.
#pragma once

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

// Lengths are clamped to what the tensors hold, so that a wrong length can not read past a page table or a cache.
BROADHEAD_HOST_DEVICE SeqlenInfo make_seqlen_info(const AttnParams& params, int batch) {
  SeqlenInfo info;
  int capacity_q = params.seqlen_q;
  info.row_q = 0;
  info.batch_q = batch;
  if (params.cu_seqlens_q) {
    info.row_q = params.cu_seqlens_q[batch];
    capacity_q = params.cu_seqlens_q[batch + 1] - params.cu_seqlens_q[batch];
    info.batch_q = 0;
  }
  info.seqlen_q = max_int(0, params.seqused_q ? min_int(params.seqused_q[batch], capacity_q) : capacity_q);

  int capacity_k = params.seqlen_k;
  info.row_k = 0;
  info.batch_k = params.kv_batch_idx ? params.kv_batch_idx[batch] : batch;
  if (params.cu_seqlens_k) {
    info.row_k = params.cu_seqlens_k[batch];
    capacity_k = params.cu_seqlens_k[batch + 1] - params.cu_seqlens_k[batch];
    info.batch_k = 0;
  }
  int seqlen_k = params.seqused_k ? min_int(params.seqused_k[batch], capacity_k) : capacity_k;
  if (params.leftpad_k) {
    const int leftpad = max_int(0, params.leftpad_k[batch]);
    info.row_k += leftpad;
    seqlen_k -= leftpad;
  }
  info.seqlen_k = max_int(0, seqlen_k);
  return info;
}

}  // namespace broadhead
