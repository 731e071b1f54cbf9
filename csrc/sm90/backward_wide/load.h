// The producer warps of the wide Hopper backward kernels: one loads tiles by TMA, one prepares what was loaded.
#pragma once

#include "sm90/backward/load.h"
#include "sm90/backward_wide/traits.h"

namespace broadhead::sm90 {

using namespace tma;

// One lane: the rows, then the columns of all steps, of the first operand (rank 0) or the second.
template <class Traits>
BROADHEAD_DEVICE void load_operand(const BackwardArgs& args, typename Traits::SharedStorage& smem, std::uint32_t rank) {
  using Chunk = typename Traits::Chunk;
  constexpr bool kKeys = Traits::kKeys;
  const BackwardWork& work = smem.work;
  const SeqlenInfo& seqlen = work.seqlen;
  const KvMap& rows = rank == 0 ? args.first_rows : args.second_rows;
  const KvMap& cols = rank == 0 ? args.first_cols : args.second_cols;
  cute::prefetch_tma_descriptor(&cols.box);
  load_box<typename Traits::Rows>(rows, static_cast<int>(kKeys ? seqlen.row_k : seqlen.row_q) + work.first_row,
                                  x_coordinate(rows, work.head, kKeys ? seqlen.batch_k : seqlen.batch_q), smem.rows,
                                  smem.rows_full);
  RingState<Traits::kStages> ring;
  for_each_step(work, [&](int head, int tile) {
    const int x = x_coordinate(cols, kKeys ? head : work.kv_head, kKeys ? seqlen.batch_q : seqlen.batch_k);
    const int row = static_cast<int>(kKeys ? seqlen.row_q : seqlen.row_k) + tile * Traits::kCols;
#pragma unroll 1
    for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
      Barrier& full = smem.chunk_full[ring.stage()][chunk];
      const std::uint32_t target = smem_address(smem.chunks[ring.stage()][chunk]);
      barrier_wait(smem.chunk_empty[ring.stage()][chunk], ring.parity() ^ 1);
      full.arrive_and_expect_tx(Traits::kChunkBytes);
      BROADHEAD_UNROLL
      for (int s = 0; s < Chunk::kSubtiles; ++s) {
        tma_load(&cols.box, target + s * Chunk::kSubtileStride, full,
                 Traits::first_column(chunk) + s * Chunk::kSubtileCols, row, 0, 0, x);
      }
    }
    ring.advance();
  });
}

// One warp: waits for a stage, and clears its rows for which `dead(row)` holds.
template <class Traits, class Dead>
BROADHEAD_DEVICE void clear_stage(typename Traits::SharedStorage& smem, const RingState<Traits::kStages>& ring,
                                  const Dead& dead) {
#pragma unroll 1
  for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
    barrier_wait(smem.chunk_full[ring.stage()][chunk], ring.parity());
    clear_where<typename Traits::Chunk, Traits::kCols>(smem.chunks[ring.stage()][chunk], 0, 1, dead);
  }
  cutlass::arch::fence_view_async_shared();
}

// One warp prepares the columns of all steps. Keys: LSE and D of queries; those without a gradient become zeros, as in
// load_stats. Queries: K of keys that no query of the tile sees becomes zeros. It waits for all who wait for it: a
// parity tells them a step from the one a ring before, not from the one two rings before.
template <class Traits>
BROADHEAD_DEVICE void prepare_steps(const BackwardArgs& args, typename Traits::SharedStorage& smem,
                                    std::uint32_t rank) {
  const BackwardWork& work = smem.work;
  RingState<Traits::kStages> ring;
  for_each_step(work, [&](int head, int tile) {
    const int col0 = tile * Traits::kCols;
    const std::uint32_t stage = ring.stage();
    const auto wait_empty = [&] {
      for (int half = 0; half < 2; ++half) {
        barrier_wait(smem.chunk_empty[stage][Traits::chunk_of(half, Traits::kParts - 1)], ring.parity() ^ 1);
      }
    };
    if constexpr (Traits::kKeys) {
      LaneStats<Traits::kCols / 32> stats;
      stats.load(args.params, work, head, col0);  // on their way while the stage is waited for
      wait_empty();
      barrier_wait(smem.stats_empty[stage], ring.parity() ^ 1);
      if (rank == 0) store_given<Traits::kRows, Traits::kCols>(work, col0, smem.beside.given[stage]);
      const auto store_delta = [&](int query, float delta) { smem.delta[stage][stat_place<true>(query)] = delta; };
      if (stats.template store<true>(work, smem.lse[stage], store_delta)) {
        clear_stage<Traits>(smem, ring, [&](int row) { return smem.lse[stage][stat_place<true>(row)] == INFINITY; });
      }
    } else {
      wait_empty();
      if (rank == 0 && !work.live.all(col0, Traits::kCols)) {
        clear_stage<Traits>(smem, ring, [&](int row) { return !work.live.contains(col0 + row); });
      }
    }
    smem.prepared[stage].arrive();
    ring.advance();
  });
}

}  // namespace broadhead::sm90
