// Global -> shared copies of the portable backward kernels: tiles of rows, and the LSE and D of queries.
#pragma once

#include "sm80/backward/traits.h"
#include "sm80/forward/load.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// Rows of one sequence and head in global memory. `base` is that of row 0. Rows that no pair of the tile needs become
// zeros and are never read: they may be NaN, and a weight of 0 does not hide that.
template <class Element>
struct RowSource {
  const Element* base;
  long long row_stride;
  LiveKeys live;  // of queries, too
  int columns;    // columns from here on become zeros
};

// Copies rows [first_row, first_row + kTileRows), all threads of the CTA together.
template <class Traits, int kTileRows>
BROADHEAD_DEVICE void copy_rows(const void* tile, const RowSource<typename Traits::Element>& source, int first_row) {
  using Plan = CopyPlan<Traits::kThreads, kTileRows, Traits::kTileCols>;
  const int unit = threadIdx.x % 8;
  const int row_slot = (threadIdx.x / 8) % Plan::kRowSlots;
  const int col_slot = (threadIdx.x / 8) / Plan::kRowSlots;
  const std::uint32_t target = smem_address(tile) + row_slot * 128 + ((unit ^ (row_slot & 7)) * 16);
  BROADHEAD_UNROLL
  for (int i = 0; i < Plan::kRowSteps; ++i) {
    const int row = first_row + row_slot + i * Plan::kRowSlots;
    const bool live = source.live.contains(row);
    const typename Traits::Element* pointer = source.base + unit * 8 + (live ? row * source.row_stride : 0);
    BROADHEAD_UNROLL
    for (int j = 0; j < Plan::kColSteps; ++j) {
      const int subtile = col_slot + j * Plan::kColSlots;
      if (Plan::kSubtiles % Plan::kColSlots != 0 && subtile >= Plan::kSubtiles) continue;
      cp_async_16(target + i * Plan::kRowSlots * 128 + subtile * (kTileRows * 128), pointer + subtile * 64,
                  live && subtile * 64 + unit * 8 < source.columns);
    }
  }
}

// Rows of sequence and head in a tensor of queries (q, dout).
template <class Element>
BROADHEAD_DEVICE RowSource<Element> query_rows(const void* tensor, const TensorStrides& strides,
                                               const SeqlenInfo& seqlen, int head, const LiveKeys& live, int columns) {
  const Element* base = static_cast<const Element*>(tensor) + seqlen.batch_q * strides.batch +
                        seqlen.row_q * strides.row + head * strides.head;
  return {base, strides.row, live, columns};
}

// Likewise of keys (k, v).
template <class Element>
BROADHEAD_DEVICE RowSource<Element> key_rows(const void* tensor, const TensorStrides& strides, const SeqlenInfo& seqlen,
                                             int head, const LiveKeys& live, int columns) {
  const Element* base = static_cast<const Element*>(tensor) + seqlen.batch_k * strides.batch +
                        seqlen.row_k * strides.row + head * strides.head;
  return {base, strides.row, live, columns};
}

// {LSE in units of log2(e), D} of a query. A query that does not exist or sees no key has an LSE of +inf, so that its
// P is 0.
BROADHEAD_DEVICE float2 load_stats(const AttnBwdParams& params, const SeqlenInfo& seqlen, int head, int query) {
  if (query >= seqlen.seqlen_q) return make_float2(INFINITY, 0.f);
  const std::int64_t row = seqlen.row_q + query;
  const float lse = params.softmax_lse[seqlen.batch_q * params.lse_batch_stride + head * params.lse_head_stride + row];
  if (lse == -INFINITY) return make_float2(INFINITY, 0.f);
  const std::int64_t total_row = seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + row;
  return make_float2(lse * kLog2e, params.delta[head * params.total_q + total_row]);
}

}  // namespace broadhead::sm80
