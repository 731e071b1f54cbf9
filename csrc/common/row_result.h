// From a row's running maximum and sum to its normalisation and LSE, and where its results go.
#pragma once

#include "common/rows.h"
#include "common/score.h"
#include "common/seqlen_info.h"

namespace broadhead {

template <class Element>
BROADHEAD_DEVICE float load_sink(const AttnParams& params, int head) {
  return params.sinks_are_fp32 ? static_cast<const float*>(params.sinks)[head]
                               : static_cast<float>(static_cast<const Element*>(params.sinks)[head]);
}

// Where a row of a tile belongs. It is found once, since packed rows cost a division.
struct RowPlace {
  bool live;
  int head;  // the query head
  int token;
};

BROADHEAD_DEVICE RowPlace place_row(const OutputRows& output, int row) {
  const int rows_per_token = output.rows.rows_per_token;
  const int token = output.rows.token(row);
  return {output.live(row), output.head * rows_per_token + output.rows.first_row + row - token * rows_per_token, token};
}

// The state of OnlineSoftmax for a row, its sum over all lanes.
struct RowStats {
  float max;
  float sum;
};

struct RowResult {
  float inverse;  // O is multiplied by it; 0: no visible key
  float lse;
};

// `split` < 0 means the final output, which the sink joins; else the row is of a split, and the combine adds the sink.
template <class Element>
BROADHEAD_DEVICE RowResult finish_row(const AttnParams& params, const RowPlace& row, RowStats stats,
                                      const ScoreScale& scale, int split) {
  // A row of NaN scores has no maximum either, but its sum is NaN: no sink makes it a number.
  const bool empty = stats.max == -INFINITY && stats.sum == 0.f;
  float sink = -INFINITY;
  if (params.sinks != nullptr && split < 0 && row.live) sink = load_sink<Element>(params, row.head);
  if (stats.sum > 0.f) {
    // The sink's term relative to the running reference; it is far out of range only when it dominates the row.
    const float reference = stats.max * scale.scale;
    // Where exp overflows fp32 the row is all sink.
    stats.sum = sink - reference > 80.f ? INFINITY : stats.sum + exp2f((sink - reference) * kLog2e);
    if (stats.sum == INFINITY) return {0.f, sink};
  }
  if (empty) return {0.f, -INFINITY};
  // PERF: each row has this code, and the exact functions take 60 instructions. The sum is not below 1, or NaN; its
  // logarithm is off by 4e-7 at most.
  return {__fdividef(1.f, stats.sum), stats.max * scale.scale + (stats.sum == INFINITY ? 0.f : log_approx(stats.sum))};
}

// Index of a row among all rows of a head.
BROADHEAD_DEVICE std::int64_t total_row(const AttnParams& params, const SeqlenInfo& seqlen, int token) {
  return seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q + token;
}

// Where the LSE of a row goes; null when it is not wanted.
BROADHEAD_DEVICE float* lse_address(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace& row) {
  if (params.softmax_lse == nullptr) return nullptr;
  return params.softmax_lse + seqlen.batch_q * params.lse_batch_stride + row.head * params.lse_head_stride +
         seqlen.row_q + row.token;
}

BROADHEAD_DEVICE void write_lse(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace& row, float lse,
                                int split) {
  if (!row.live) return;
  if (split >= 0) {
    params.lse_partial[(static_cast<std::int64_t>(split) * params.num_heads_q + row.head) * params.total_q +
                       total_row(params, seqlen, row.token)] = lse;
  } else if (params.softmax_lse != nullptr) {
    *lse_address(params, seqlen, row) = lse;
  }
}

BROADHEAD_DEVICE float* partial_row(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace& row,
                                    int split) {
  return params.out_partial + ((static_cast<std::int64_t>(split) * params.num_heads_q + row.head) * params.total_q +
                               total_row(params, seqlen, row.token)) *
                                  params.head_dim_v;
}

template <class Element>
BROADHEAD_DEVICE Element* output_row(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace& row) {
  return static_cast<Element*>(params.out) + seqlen.batch_q * params.out_strides.batch +
         (seqlen.row_q + row.token) * params.out_strides.row + row.head * params.out_strides.head;
}

}  // namespace broadhead
