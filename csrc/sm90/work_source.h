// The scheduler warp: takes tiles from a global counter, works out what each is, and posts them to the other warps.
//
// Order: LPT within what shares the L2. Uniform batches follow common/tile_scheduler.h; ragged ones go sequence by
// sequence, found by a warp-wide prefix sum over their tile counts, so that a short sequence costs nothing.
#pragma once

#include "common/tile_state.h"
#include "sm90/ptx.h"

namespace broadhead::sm90 {

constexpr int kTileSlots = 2;

// How the launcher divides a call; constant for all of its tiles.
struct WorkPlan {
  std::int32_t rows_per_tile;  // query rows a tile holds: whole tokens, or a part of one
  std::int32_t m_blocks;       // tiles of the longest sequence, in clusters
  std::int32_t heads;          // in the grid: KV heads when GQA is packed
  std::int32_t ragged;         // sequences differ in query length or in splits
  std::int32_t tiles;          // of the grid when not ragged, all splits
};

template <class Element>
struct TileSlot {
  TileState<Element> state;
  std::int32_t split;  // -1: the tile's result is final
  std::int32_t valid;  // 0: no more work
};

using SlotState = RingState<kTileSlots>;

struct WorkItem {
  WorkTile tile;
  int split;
  bool valid;
};

// Maps a rising sequence of indices to tiles; all lanes of the warp hold the same result.
struct WorkCursor {
  int group_start = 0;  // index of the first tile of the current 32 sequences
  int group = 0;              // their first sequence

  BROADHEAD_DEVICE static int sequence_tiles(const AttnParams& params, const WorkPlan& plan, int batch, int cluster) {
    if (batch >= params.batch) return 0;
    const int rows_per_token = params.pack_gqa ? params.num_heads_q / params.num_heads_kv : 1;
    const int rows = make_seqlen_info(params, batch).seqlen_q * rows_per_token;
    return ceil_div(rows, plan.rows_per_tile * cluster);
  }

  BROADHEAD_DEVICE WorkItem find(const AttnParams& params, const WorkPlan& plan, int index, int cluster) {
    if (!plan.ragged) {
      if (index >= plan.tiles) return {{0, 0, 0}, 0, false};
      const int tiles = plan.m_blocks * plan.heads * params.batch;
      const int split = index / tiles;
      return {work_tile(index - split * tiles, plan.m_blocks, plan.heads, params.batch, params.heads_per_section),
              split, true};
    }
    const int lane = threadIdx.x % 32;
    for (; group < params.batch; group += 32) {
      const int batch = group + lane;
      const int m_blocks = sequence_tiles(params, plan, batch, cluster);
      const int splits = batch < params.batch ? sequence_splits(params, batch) : 0;
      const int tiles = m_blocks * splits * plan.heads;
      int sum = tiles;
      BROADHEAD_UNROLL
      for (int i = 1; i < 32; i *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, i);
        if (lane >= i) sum += other;
      }
      const int total = __shfl_sync(0xffffffffu, sum, 31);
      if (index >= group_start + total) {
        group_start += total;
        continue;
      }
      const int offset = index - group_start;
      const int owner = __ffs(__ballot_sync(0xffffffffu, offset < sum)) - 1;
      const int first = __shfl_sync(0xffffffffu, sum - tiles, owner);
      const int owner_m_blocks = __shfl_sync(0xffffffffu, m_blocks, owner);
      const int owner_splits = __shfl_sync(0xffffffffu, splits, owner);
      const int rest = offset - first;
      const int per_head = owner_m_blocks * owner_splits;
      const int head = rest / per_head;
      const int in_head = rest - head * per_head;
      const int m = in_head / owner_splits;
      return {{owner_m_blocks - 1 - m, head, group + owner}, in_head - m * owner_splits, true};
    }
    return {{0, 0, 0}, 0, false};
  }
};

// What the blocks of a cluster tell each other: the index of the next tile.
struct Mailbox {
  std::uint32_t index[kTileSlots];
  Barrier full[kTileSlots];   // 1 arrival (own scheduler) + 4 bytes from the leader
  Barrier empty[kTileSlots];  // leader's: 1 arrival of each block's scheduler
};

// Runs on one warp until the work ends; posts a slot with valid = 0 last.
template <class Traits, class SharedStorage, class Args>
BROADHEAD_DEVICE void post_tiles(const Args& args, SharedStorage& smem) {
  constexpr int kCluster = Traits::kCluster;
  const AttnParams& params = args.params;
  const WorkPlan& plan = args.plan;
  const int lane = threadIdx.x % 32;
  const std::uint32_t rank = kCluster > 1 ? cluster_rank() : 0;
  WorkCursor cursor;
  SlotState slot;
  SlotState mail;
  int index = blockIdx.x / kCluster;
  while (true) {
    const WorkItem work = cursor.find(params, plan, index, kCluster);
    const int m_block = work.tile.m_block * kCluster + static_cast<int>(rank);
    barrier_wait(smem.tile_empty[slot.stage()], slot.parity() ^ 1);
    auto& posted = smem.tiles[slot.stage()];
    int splits = 0;
    if (lane == 0) {
      posted.valid = work.valid;
      if (work.valid) {
        posted.split = work.split;
        make_tile_state(posted.state, params, {m_block, work.tile.head, work.tile.batch}, work.split,
                        {.rows = plan.rows_per_tile,
                         .keys = Traits::kTileN,
                         .head_dim = Traits::kHeadDim,
                         .head_dim_v = Traits::kHeadDimV,
                         .cluster = kCluster});
        splits = posted.state.splits;
        if (splits == 1) posted.split = -1;
      }
      // A tile without rows, or a share that its sequence does not use, is not posted.
      if (!work.valid || splits > 0) barrier_arrive(smem.tile_full[slot.stage()]);
    }
    splits = __shfl_sync(0xffffffffu, splits, 0);
    if (!work.valid) return;
    if (splits > 0) {
      slot.advance();
      // A tile taken now would wait in this block while others run dry.
      // It has as many phases as tiles were posted.
      if (rank == 0) barrier_wait(smem.next_wanted, slot.stage() ^ 1);
    }

    unsigned next = 0;
    if constexpr (kCluster == 1) {
      if (lane == 0) next = atomicAdd(reinterpret_cast<unsigned*>(params.tile_counter), 1u);
    } else {
      if (lane == 0) {
        barrier_expect(smem.mailbox.full[mail.stage()], 4);
        if (rank == 0) {
          barrier_wait(smem.mailbox.empty[mail.stage()], mail.parity() ^ 1);
          const unsigned taken = atomicAdd(reinterpret_cast<unsigned*>(params.tile_counter), 1u);
          for (int peer = 0; peer < kCluster; ++peer) {
            store_async(smem_address(&smem.mailbox.index[mail.stage()]), taken, smem.mailbox.full[mail.stage()], peer);
          }
        }
        barrier_wait(smem.mailbox.full[mail.stage()], mail.parity());
        next = *const_cast<volatile std::uint32_t*>(&smem.mailbox.index[mail.stage()]);
        barrier_arrive_cluster(smem.mailbox.empty[mail.stage()], 0);
      }
      mail.advance();
    }
    index = static_cast<int>(__shfl_sync(0xffffffffu, next, 0)) + gridDim.x / kCluster;
  }
}

}  // namespace broadhead::sm90
