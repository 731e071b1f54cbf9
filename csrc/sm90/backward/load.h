// The producer warps of the Hopper backward kernels: one loads tiles by TMA, one brings LSE and D of queries.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>

#include "sm90/backward/traits.h"
#include "tma/copy.h"

namespace broadhead::sm90 {

using namespace tma;

// What a launch hands to a kernel.
struct BackwardArgs {
  AttnBwdParams params;
  KvMap first_rows;    // K, or Q
  KvMap second_rows;   // V, or dO
  KvMap first_cols;    // Q, or K
  KvMap second_cols;   // dO, or V
  std::int32_t tiles;  // of rows, of each head and sequence
  std::int32_t heads_per_section;
};

BROADHEAD_DEVICE int x_coordinate(const KvMap& map, int head, int batch) {
  return head * map.head_step + batch * map.batch_step;
}

// One lane loads the rows of a tile from `row` on. Columns past head_dim and rows past the tensor's end become zeros.
template <class Layout>
BROADHEAD_DEVICE void load_box(const KvMap& map, int row, int x, const void* target, Barrier& full) {
  full.arrive_and_expect_tx(Layout::kSubtiles * Layout::kSubtileStride);
#pragma unroll 1
  for (int s = 0; s < Layout::kSubtiles; ++s) {
    tma_load(&map.box, smem_address(target) + s * Layout::kSubtileStride, full, s * Layout::kSubtileCols, row, 0, 0, x);
  }
}

// One lane: the rows, then the columns of all steps.
template <class Traits>
BROADHEAD_DEVICE void load_tiles(const BackwardArgs& args, typename Traits::SharedStorage& smem) {
  constexpr bool kKeys = Traits::kKeys;
  const BackwardWork& work = smem.work;
  const BlockRange range = work.range;
  if (range.begin >= range.end) return;
  cute::prefetch_tma_descriptor(&args.first_cols.box);
  cute::prefetch_tma_descriptor(&args.second_cols.box);
  const SeqlenInfo& seqlen = work.seqlen;
  const int row0 = static_cast<int>(kKeys ? seqlen.row_k : seqlen.row_q) + work.first_row;
  const int col0 = static_cast<int>(kKeys ? seqlen.row_q : seqlen.row_k);
  const int row_batch = kKeys ? seqlen.batch_k : seqlen.batch_q, col_batch = kKeys ? seqlen.batch_q : seqlen.batch_k;
  load_box<typename Traits::FirstRows>(args.first_rows, row0, x_coordinate(args.first_rows, work.head, row_batch),
                                       smem.first_rows, smem.rows_full[0]);
  load_box<typename Traits::SecondRows>(args.second_rows, row0, x_coordinate(args.second_rows, work.head, row_batch),
                                        smem.second_rows, smem.rows_full[1]);
  RingState<Traits::kStages> first;
  RingState<Traits::kStages2> second;
  for (int head = 0; head < work.heads; ++head) {
    const int col_head = kKeys ? work.first_head + head : work.kv_head;
    const int x1 = x_coordinate(args.first_cols, col_head, col_batch);
    const int x2 = x_coordinate(args.second_cols, col_head, col_batch);
    for (int tile = range.begin; tile < range.end; ++tile) {
      const int row = col0 + tile * Traits::kCols;
      barrier_wait(smem.first_empty[first.stage()], first.parity() ^ 1);
      load_box<typename Traits::FirstCols>(args.first_cols, row, x1, smem.first_cols[first.stage()],
                                           smem.first_full[first.stage()]);
      first.advance();
      barrier_wait(smem.second_empty[second.stage()], second.parity() ^ 1);
      load_box<typename Traits::SecondCols>(args.second_cols, row, x2, smem.second_cols[second.stage()],
                                            smem.second_full[second.stage()]);
      second.advance();
    }
  }
}

// One warp: LSE and D of the queries of all steps. Those that no key of the tile meets are as if they did not exist.
template <class Traits>
BROADHEAD_DEVICE void load_stats(const BackwardArgs& args, typename Traits::SharedStorage& smem) {
  constexpr int kPerLane = Traits::kCols / 32;
  const BackwardWork& work = smem.work;
  const BlockRange range = work.range;
  const int lane = threadIdx.x % 32;
  RingState<Traits::kStages> ring;
  for (int head = work.first_head; head < work.first_head + work.heads; ++head) {
    for (int tile = range.begin; tile < range.end; ++tile) {
      QueryStats stats[kPerLane];  // on their way while the stage is waited for
      bool dead = false;
      BROADHEAD_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        const int query = tile * Traits::kCols + i * 32 + lane;
        stats[i] = {INFINITY, 0.f};
        if (work.live.contains(query)) stats[i] = load_query_stats(args.params, work.seqlen, head, query);
      }
      const std::uint32_t stage = ring.stage();
      barrier_wait(smem.first_empty[stage], ring.parity() ^ 1);
      BROADHEAD_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        smem.lse[stage][i * 32 + lane] = stats[i].lse;
        smem.delta[stage][i * 32 + lane] = stats[i].delta;
        dead = dead || stats[i].lse == INFINITY;
      }
      dead = __any_sync(0xffffffffu, dead);
      if (lane == 0) smem.dead[stage] = dead;
      smem.first_full[stage].arrive();
      ring.advance();
    }
  }
}

}  // namespace broadhead::sm90
