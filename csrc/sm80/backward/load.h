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
  // Queries of `head` whose LSE is -inf may be NaN, and become zeros. Nullable. PERF: where it lies is a constant,
  // which takes no register.
  const GivenLse* lse = nullptr;
  int head = 0;
};

// Copies rows [first_row, first_row + kTileRows), all threads of the CTA together.
template <class Traits, int kTileRows>
BROADHEAD_DEVICE void copy_rows(const void* tile, const RowSource<typename Traits::Element>& source, int first_row) {
  using Plan = CopyPlan<Traits::kThreads, kTileRows, Traits::kTileCols>;
  const unsigned thread = fresh_thread();  // unsigned: cheaper to divide
  const int unit = thread % 8;
  const int row_slot = thread / 8 % Plan::kRowSlots;
  const int col_slot = thread / 8 / Plan::kRowSlots;
  const std::uint32_t target = smem_address(tile) + row_slot * 128 + ((unit ^ (row_slot & 7)) * 16);
  const auto copy_row = [&](int i, const typename Traits::Element* pointer, bool live) {
    BROADHEAD_UNROLL
    for (int j = 0; j < Plan::kColSteps; ++j) {
      const int subtile = col_slot + j * Plan::kColSlots;
      if (Plan::kSubtiles % Plan::kColSlots != 0 && subtile >= Plan::kSubtiles) continue;
      cp_async_16(target + i * Plan::kRowSlots * 128 + subtile * (kTileRows * 128), pointer + subtile * 64,
                  live && subtile * 64 + unit * 8 < source.columns);
    }
  };
  const typename Traits::Element* first = source.base + unit * 8;
  if (first_row >= source.live.interval.begin && first_row + kTileRows <= source.live.interval.end) {
    first += (first_row + row_slot) * source.row_stride;
    BROADHEAD_UNROLL
    for (int i = 0; i < Plan::kRowSteps; ++i) copy_row(i, first + i * Plan::kRowSlots * source.row_stride, true);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < Plan::kRowSteps; ++i) {
    const int row = first_row + row_slot + i * Plan::kRowSlots;
    bool live = source.live.contains(row);
    if (live && source.lse != nullptr && source.lse->first != nullptr) {
      live = source.lse->first[source.head * source.lse->head_stride + row] != -INFINITY;
    }
    copy_row(i, first + (live ? row * source.row_stride : 0), live);
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

// Copies LSE and D of queries [first, first + kCount), of which `live` exist. Those of the others become 0, as their dO
// is.
template <int kCount>
BROADHEAD_DEVICE void copy_stats(const float* target_lse, const float* target_delta, const float* lse,
                                 const float* delta, int first, int live) {
  const int thread = fresh_thread();
  if (thread >= kCount) return;
  const bool exists = first + thread < live;
  const int query = exists ? first + thread : 0;
  cp_async_4(smem_address(target_lse + thread), lse + query, exists);
  cp_async_4(smem_address(target_delta + thread), delta + query, exists);
}

}  // namespace broadhead::sm80
