// The scheduler warp: takes tiles in turn or from a global counter, works out what each is, and posts them to the other
// warps.
//
// Tiles that take as long as each other, and those of at most two rounds, need no counter: see tile_of_round.
//
// Order: LPT within what shares the L2. Uniform batches follow common/tile_scheduler.h; ragged ones go sequence by
// sequence, found by a warp-wide prefix sum over their tile counts, so that a short sequence costs nothing.
#pragma once

#include "common/tile_state.h"
#include "tma/barrier.h"
#include "tma/ring_state.h"

namespace broadhead::tma {

constexpr int kTileSlots = 2;
constexpr int kNoTile = 0x7fffffff;  // an index behind all tiles

// How the launcher divides a call; constant for all of its tiles.
struct WorkPlan {
  std::int32_t rows_per_tile;  // query rows a tile holds: whole tokens, or a part of one
  TileGrid grid;               // m_blocks in clusters; KV heads when GQA is packed
  std::int32_t ragged;         // sequences differ in query length or in splits
  std::int32_t tiles;          // of the grid when not ragged, all splits
  // Tiles of each CTA, or cluster, at most, where the grid's order gives them. 0: they are taken from a counter.
  std::int32_t rounds;
};

template <class Element>
struct TileSlot {
  TileState<Element> state;
  std::int32_t split;  // -1: the tile's result is final
  std::int32_t valid;  // 0: no more work
};

// TileSlot::split; where no tile is split the compiler knows it.
template <class Traits, class Slot>
BROADHEAD_DEVICE int split_of(const Slot& tile) {
  return Traits::kSplits ? tile.split : -1;
}

// Posts and barriers that every kernel has in its shared memory.
template <class Element>
struct WorkStorage {
  TileSlot<Element> tiles[kTileSlots];
  Barrier tile_full[kTileSlots];   // 1 arrival: the scheduler
  Barrier tile_empty[kTileSlots];  // each reading warp
  Barrier next_wanted;             // 1 arrival a tile: its producer is near the end
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
  int group = 0;        // their first sequence

  BROADHEAD_DEVICE static int sequence_tiles(const AttnParams& params, const WorkPlan& plan, int batch, int cluster) {
    if (batch >= params.batch) return 0;
    const int rows = make_seqlen_info(params, batch).seqlen_q * params.rows_per_token;
    return ceil_div(rows, plan.rows_per_tile * cluster);
  }

  BROADHEAD_DEVICE WorkItem find(const AttnParams& params, const WorkPlan& plan, int index, int cluster) {
    if (index == kNoTile) return {{0, 0, 0}, 0, false};
    if (!plan.ragged) {
      if (index >= plan.tiles) return {{0, 0, 0}, 0, false};
      const int tiles = plan.grid.m_blocks * plan.grid.total_heads;
      const int split = index < tiles ? 0 : index / tiles;
      return {plan.grid.tile(index - split * tiles), split, true};
    }
    const int lane = threadIdx.x % 32;
    for (; group < params.batch; group += 32) {
      const int batch = group + lane;
      const int m_blocks = sequence_tiles(params, plan, batch, cluster);
      const int splits = batch < params.batch ? sequence_splits(params, batch) : 0;
      const int tiles = m_blocks * splits * plan.grid.heads;
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

// What the leader of a cluster, rank 0, tells the others of the next tile. It alone reads the lengths: with others of
// their own, which another stream could have changed, the CTAs would wait for each other for ever.
struct WorkMessage {
  static constexpr int kWords = 12;
  std::int32_t words[kWords];

  BROADHEAD_DEVICE void set(const WorkItem& work, const TileLengths& lengths) {
    const SeqlenInfo& seqlen = lengths.seqlen;
    const std::int32_t all[kWords] = {work.tile.m_block, work.tile.head, work.tile.batch, work.split, work.valid,
                                      // Rows of a map: they fit.
                                      static_cast<std::int32_t>(seqlen.row_q), static_cast<std::int32_t>(seqlen.row_k),
                                      seqlen.seqlen_q, seqlen.seqlen_k, seqlen.batch_k, lengths.prefix_len,
                                      lengths.splits};
    BROADHEAD_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = all[i];
  }

  BROADHEAD_DEVICE void get(const AttnParams& params, WorkItem& work, TileLengths& lengths) const {
    std::int32_t all[kWords];
    BROADHEAD_UNROLL
    for (int i = 0; i < kWords; ++i) all[i] = const_cast<const volatile std::int32_t&>(words[i]);
    work = {{all[0], all[1], all[2]}, all[3], all[4] != 0};
    const int batch_q = params.cu_seqlens_q == nullptr ? work.tile.batch : 0;
    lengths = {{all[5], all[6], all[7], all[8], batch_q, all[9]}, all[10], all[11]};
  }
};

struct Mailbox {
  WorkMessage message[kTileSlots];
  Barrier full[kTileSlots];   // 1 arrival (own scheduler) + a message from the leader
  Barrier empty[kTileSlots];  // leader's: 1 arrival of the scheduler of each other CTA
};

// One thread of each CTA of the cluster: what the leader found goes to all.
template <int kCluster>
BROADHEAD_DEVICE void share_work(const AttnParams& params, Mailbox& mailbox, SlotState& mail, std::uint32_t rank,
                                 WorkItem& work, TileLengths& lengths) {
  const std::uint32_t stage = mail.stage();
  if (rank == 0) {
    WorkMessage message;
    message.set(work, lengths);
    barrier_wait(mailbox.empty[stage], mail.parity() ^ 1);
    for (int peer = 1; peer < kCluster; ++peer) {
      BROADHEAD_UNROLL
      for (int i = 0; i < WorkMessage::kWords; ++i) {
        cute::store_shared_remote(message.words[i], smem_address(&mailbox.message[stage].words[i]),
                                  smem_address(&mailbox.full[stage]), peer);
      }
    }
  } else {
    mailbox.full[stage].arrive_and_expect_tx(sizeof(WorkMessage));
    barrier_wait(mailbox.full[stage], mail.parity());
    mailbox.message[stage].get(params, work, lengths);
    mailbox.empty[stage].arrive(0u);
  }
  mail.advance();
}

// The scheduler of a CTA: one warp, all of whose lanes call everything.
template <class Traits, class SharedStorage, class Args>
class TilePoster {
  static constexpr int kCluster = Traits::kCluster;
  using Element = typename Traits::Element;

  const Args& args_;
  SharedStorage& smem_;
  WorkCursor cursor_;
  SlotState slot_;
  SlotState mail_;
  int index_ = static_cast<int>(blockIdx.x) / kCluster;
  int round_ = 0;
  bool valid_ = false;  // the tile that was made: whether there is one
  int splits_ = 0;      // its splits; 0: a tile without rows, or a split that its sequence does not use

  BROADHEAD_DEVICE static int rank() { return kCluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0; }

  // Writes the tile of the index into the slot. kFirst: the slot was never used, and no barrier is set up yet.
  template <bool kFirst>
  BROADHEAD_DEVICE void make() {
    const AttnParams& params = args_.params;
    const WorkPlan& plan = args_.plan;
    const int lane = threadIdx.x % 32;
    WorkItem work{};  // of a cluster: where rank is not 0 in one lane alone
    TileLengths lengths{};
    if (rank() == 0) work = cursor_.find(params, plan, index_, kCluster);
    if (lane == 0) {
      if (rank() == 0 && work.valid) lengths = read_lengths(params, work.tile.batch);
      if constexpr (kCluster > 1) share_work<kCluster>(params, smem_.mailbox, mail_, rank(), work, lengths);
    }
    if constexpr (kCluster > 1) work.valid = __shfl_sync(0xffffffffu, static_cast<int>(work.valid), 0) != 0;
    const int m_block = work.tile.m_block * kCluster + rank();
    if constexpr (!kFirst) barrier_wait(smem_.tile_empty[slot_.stage()], slot_.parity() ^ 1);
    auto& posted = smem_.tiles[slot_.stage()];
    int splits = 0;
    if (lane == 0) {
      posted.valid = work.valid;
      if (work.valid) {
        posted.split = work.split;
        make_tile_state(posted.state, params, {m_block, work.tile.head, work.tile.batch}, lengths, work.split,
                        {.rows = plan.rows_per_tile,
                         .keys = Traits::kTileN,
                         .head_dim = Traits::kHeadDim,
                         .head_dim_v = Traits::kHeadDimV,
                         .cluster = kCluster,
                         .plain = Traits::kPlainCall,
                         .pages = Traits::kPages,
                         .splits = Traits::kSplits,
                         .whole_blocks = true,
                         .fills = Traits::kFillsDense});
        splits = posted.state.splits;
        if (!Traits::kSplits || splits == 1) posted.split = -1;
      }
    }
    valid_ = work.valid;
    splits_ = __shfl_sync(0xffffffffu, splits, 0);
  }

 public:
  BROADHEAD_DEVICE TilePoster(const Args& args, SharedStorage& smem) : args_(args), smem_(smem) {}

  // Makes the first tile while other warps set up the barriers.
  // PERF: a tile's state is several hundred instructions that no cache holds yet, and reads lengths.
  BROADHEAD_DEVICE void make_first() { make<true>(); }

  // Posts tiles until the work ends, and a slot with valid = 0 last. `made`: the first one is.
  BROADHEAD_DEVICE void run(bool made) {
    const int lane = threadIdx.x % 32;
    while (true) {
      if (!made) make<false>();
      made = false;
      if (lane == 0 && (!valid_ || splits_ > 0)) smem_.tile_full[slot_.stage()].arrive();
      if (!valid_) return;
      if (splits_ > 0) {
        slot_.advance();
        // A tile taken now from the counter would wait in this CTA while others are idle. The barrier has as many
        // phases as tiles were posted.
        if (rank() == 0 && args_.plan.rounds == 0) barrier_wait(smem_.next_wanted, slot_.stage() ^ 1);
      }
      if (rank() == 0) take_next();
    }
  }

 private:
  BROADHEAD_DEVICE void take_next() {
    const int ctas = static_cast<int>(gridDim.x) / kCluster;
    if (args_.plan.rounds > 0) {
      ++round_;
      index_ =
          round_ < args_.plan.rounds ? tile_of_round(round_, static_cast<int>(blockIdx.x) / kCluster, ctas) : kNoTile;
      return;
    }
    unsigned next = 0;
    if (threadIdx.x % 32 == 0) next = atomicAdd(reinterpret_cast<unsigned*>(args_.params.tile_counter), 1u);
    index_ = static_cast<int>(__shfl_sync(0xffffffffu, next, 0)) + ctas;
  }
};

}  // namespace broadhead::tma
