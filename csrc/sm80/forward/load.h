// Copies from global to shared memory in the portable kernel: rows of Q, and chunks of K and V of dense, packed and
// paged sequences.
#pragma once

#include "sm80/forward/traits.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// Divides a kRows x kCols tile among the threads of the CTA: eight neighbouring threads copy 128 bytes of a row.
template <int kThreads, int kRows, int kCols>
struct CopyPlan {
  static constexpr int kSlots = kThreads / 8;
  static constexpr int kRowSlots = kSlots < kRows ? kSlots : kRows;
  static constexpr int kColSlots = kSlots / kRowSlots;
  static constexpr int kRowSteps = kRows / kRowSlots;
  static constexpr int kSubtiles = kCols / 64;
  static constexpr int kColSteps = (kSubtiles + kColSlots - 1) / kColSlots;
  static_assert(kRows % kRowSlots == 0);
};

// The copies of one thread into kRows x kCols stages of K or V. A stage whose rows are all live costs one pointer and
// immediates; edges, paged sequences and head_dim tails take the general path.
template <class Traits, int kRows, int kCols, bool kIsK>
struct ChunkCopier {
  using Element = typename Traits::Element;
  using Plan = CopyPlan<Traits::kThreads, kRows, kCols>;
  // Steps over rows keep row % 8, and with it the XOR term of the target.
  static_assert(Plan::kRowSlots % 8 == 0);

  BROADHEAD_DEVICE static int unit() { return threadIdx.x % 8; }
  BROADHEAD_DEVICE static int row_slot() { return (threadIdx.x / 8) % Plan::kRowSlots; }
  BROADHEAD_DEVICE static int col_slot() { return (threadIdx.x / 8) / Plan::kRowSlots; }
  BROADHEAD_DEVICE static int first_col() { return col_slot() * 64 + unit() * 8; }
  // The offset of this thread's first copy inside a stage.
  BROADHEAD_DEVICE static std::uint32_t target_offset() {
    return row_slot() * 128 + ((unit() ^ (row_slot() & 7)) * 16) + col_slot() * (kRows * 128);
  }

  // This thread's first element of the stage that begins at `key0`, in column 0.
  BROADHEAD_DEVICE static const Element* first_element(const KvSource<Element>& source, int key0) {
    return (kIsK ? source.k + (key0 + row_slot()) * source.k_row_stride
                 : source.v + (key0 + row_slot()) * source.v_row_stride) +
           first_col();
  }

  BROADHEAD_DEVICE static void copy_row(int step, std::uint32_t target, const Element* pointer, bool row_live, int col,
                                        int columns) {
    BROADHEAD_UNROLL
    for (int j = 0; j < Plan::kColSteps; ++j) {
      const int subtile = j * Plan::kColSlots;
      if (Plan::kSubtiles % Plan::kColSlots != 0 && col_slot() + subtile >= Plan::kSubtiles) continue;
      // The bucket 96 has stages of 128 columns.
      if (kCols > Traits::kHeadDim && subtile * 64 + first_col() >= Traits::kHeadDim) continue;
      cp_async_16(target + step * (Plan::kRowSlots * 128) + subtile * (kRows * 128), pointer + subtile * 64,
                  row_live && col + subtile * 64 < columns);
    }
  }

  // Copies a stage whose rows and columns all exist; `pointer` is this thread's first element of it.
  BROADHEAD_DEVICE static void copy_whole(std::uint32_t target, const Element* pointer, long long row_stride) {
    BROADHEAD_UNROLL
    for (int i = 0; i < Plan::kRowSteps; ++i) {
      copy_row(i, target, pointer, true, 0, kCols);
      pointer += Plan::kRowSlots * row_stride;
    }
  }

  // Copies any stage: keys from `key0` (index `row0` in the n_block), columns from `col0`.
  BROADHEAD_DEVICE static void copy_edge(const KvSource<Element>& source, const typename Traits::PagedRow* pages,
                                         std::uint32_t target, int key0, int row0, int col0) {
    const int columns = kIsK ? source.head_dim : source.head_dim_v;
    const Element* base = (kIsK ? source.k : source.v) + col0 + first_col();
    // A large O leaves few registers free.
#pragma unroll 1
    for (int i = 0; i < Plan::kRowSteps; ++i) {
      const int row = row_slot() + i * Plan::kRowSlots;
      bool readable;
      long long offset = 0;
      if (Traits::kPages && (Traits::kPlainCall || source.table != nullptr)) {
        const long long place = kIsK ? pages[row0 + row].k : pages[row0 + row].v;
        readable = place >= 0;
        if (readable) offset = place;
      } else {
        readable = is_live<Traits>(source.live, key0 + row);
        if (readable) offset = (key0 + row) * (kIsK ? source.k_row_stride : source.v_row_stride);
      }
      copy_row(i, target, base + offset, readable, col0 + first_col(), columns);
    }
  }
};

// Copies the tile's query rows into shared memory; rows past the sequence and columns past head_dim become zero.
template <class Traits>
BROADHEAD_DEVICE void copy_q(const AttnParams& params, typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  const SeqlenInfo seqlen = smem.state.seqlen;
  const OutputRows tile = smem.state.output;
  using Plan = CopyPlan<Traits::kThreads, Traits::kTileM, Traits::kQCols>;
  const int unit = threadIdx.x % 8;
  const int row_slot = (threadIdx.x / 8) % Plan::kRowSlots;
  const int col_slot = (threadIdx.x / 8) / Plan::kRowSlots;
  const std::uint32_t target = smem_address(smem.q) + row_slot * 128 + ((unit ^ (row_slot & 7)) * 16);
  const Element* base = static_cast<const Element*>(params.q) + seqlen.batch_q * params.q_strides.batch + unit * 8;
  BROADHEAD_UNROLL
  for (int i = 0; i < Plan::kRowSteps; ++i) {
    const int row = row_slot + i * Plan::kRowSlots;
    const bool live = tile.live(row);
    const Element* pointer = base;
    if (live) {
      pointer +=
          (seqlen.row_q + tile.rows.token(row)) * params.q_strides.row + tile.query_head(row) * params.q_strides.head;
    }
    BROADHEAD_UNROLL
    for (int j = 0; j < Plan::kColSteps; ++j) {
      const int subtile = col_slot + j * Plan::kColSlots;
      if (Plan::kSubtiles % Plan::kColSlots != 0 && subtile >= Plan::kSubtiles) continue;
      cp_async_16(target + i * Plan::kRowSlots * 128 + subtile * (Traits::kTileM * 128), pointer + subtile * 64,
                  live && subtile * 64 + unit * 8 < params.head_dim);
    }
  }
}

}  // namespace broadhead::sm80
