// The producer warps of the Hopper backward kernels: one loads tiles by TMA, one brings LSE and D of queries.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/dq_sums.h"
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
  float* dq_sums;  // of fused kernels: common/dq_sums.h
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

// One warp clears the rows of a stage for which `dead(row)` holds: from `first_row` on, each `row_step`-th.
// PERF(H200, 64 x 137 tokens, head_dim 56: 178 -> 106 us): eight lanes a row, 16 rows in flight.
template <class Layout, int kRows, class Dead>
BROADHEAD_DEVICE void clear_where(void* stage, int first_row, int row_step, const Dead& dead) {
  constexpr int kParts = Layout::kRowBytes / 16, kRowsAtOnce = 32 / kParts;
  const int lane = threadIdx.x % 32;
  char* const column = static_cast<char*>(stage) + lane % kParts * 16;
#pragma unroll 4
  for (int row = first_row + lane / kParts * row_step; row < kRows; row += kRowsAtOnce * row_step) {
    if (!dead(row)) continue;
    BROADHEAD_UNROLL
    for (int subtile = 0; subtile < Layout::kSubtiles; ++subtile) {
      *reinterpret_cast<uint4*>(column + subtile * Layout::kSubtileStride + row * Layout::kRowBytes) =
          uint4{0, 0, 0, 0};
    }
  }
}

// Where the number of a step's query lies. kPaired: those that a consumer's lane needs of 16 queries (two of each
// eight) side by side, so that it reads four at a time.
template <bool kPaired>
BROADHEAD_DEVICE constexpr int stat_place(int query) {
  return kPaired ? query / 16 * 16 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2 : query;
}

// LSE and D of the queries of a step, a warp's lanes side by side. Those that no key of the tile meets are as if they
// did not exist. PERF(H200, head_dim 64, a step of 128 queries: 20 % of the consumers' time was a wait for this warp
// when each number was looked at before the next was asked for): nothing depends on what is loaded until `store`.
template <int kPerLane>
struct LaneStats {
  StoredStats of_query[kPerLane];
  int first;  // the lane's first query

  BROADHEAD_DEVICE void load(const AttnBwdParams& params, const BackwardWork& work, int head, int first_query) {
    first = first_query + static_cast<int>(threadIdx.x) % 32;
    const int last = work.seqlen.seqlen_q - 1;
    BROADHEAD_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      of_query[i] = read_query_stats(params, work.seqlen, head, min_int(first + i * 32, last));
    }
  }

  // Whether a query of the step has no gradient.
  template <bool kPaired, class StoreDelta>
  BROADHEAD_DEVICE bool store(const BackwardWork& work, float* lse, const StoreDelta& store_delta) const {
    bool dead = false;
    BROADHEAD_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      const int at = i * 32 + static_cast<int>(threadIdx.x) % 32;
      const bool exists = first + i * 32 < work.seqlen.seqlen_q && work.live.PlacedKeys::contains(first + i * 32);
      const QueryStats stats = exists ? of_query[i].stats() : QueryStats{INFINITY, 0.f};
      lse[stat_place<kPaired>(at)] = stats.lse;
      store_delta(at, stats.delta);
      dead = dead || stats.lse == INFINITY;
    }
    __syncwarp();
    return __any_sync(0xffffffffu, dead);
  }
};

// One warp: which queries of the step from `first_query` on see each key of the tile by their ranges: a bit for each of
// 32. PERF: consumers have no registers for this.
template <int kRows, int kCols>
BROADHEAD_DEVICE void store_given(const BackwardWork& work, int first_query,
                                  std::uint32_t (&given)[kRows][kCols / 32]) {
  if (!meets_given(work, first_query, kCols)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int w = 0; w < kCols / 32; ++w) {
    const int query = first_query + 32 * w + lane;
    const KeyInterval range = query < work.seqlen.seqlen_q ? work.mask.row_range(query) : KeyInterval{0, 0};
#pragma unroll 1
    for (int first_row = 0; first_row < kRows; first_row += 32) {
      std::uint32_t own = 0;
#pragma unroll 4
      for (int i = 0; i < 32; ++i) {
        const int key = work.first_row + first_row + i;
        const std::uint32_t of_key = __ballot_sync(0xffffffffu, key >= range.begin && key < range.end);
        if (lane == i) own = of_key;
      }
      given[first_row + lane][w] = own;
    }
  }
}

// Where the first or second 16 bytes of a row of stats lie: TileLayout's rows of 64 bytes, swizzled.
BROADHEAD_DEVICE int stat_chunk(int row, int chunk) { return row * 4 + (chunk ^ (row / 2 % 4)); }

// One warp: the rows' side of D as columns, and zeros in the columns of dO that no step writes.
template <class Traits>
BROADHEAD_DEVICE void clear_delta_columns(typename Traits::SharedStorage& smem) {
  const std::uint32_t one = pack_pair<typename Traits::Element>(-1.f, -1.f);
  uint4* rows = reinterpret_cast<uint4*>(smem.minus_ones);
  for (int row = threadIdx.x % 32; row < 64; row += 32) {
    rows[stat_chunk(row, 0)] = make_uint4(one, one & 0xffffu, 0, 0);
    rows[stat_chunk(row, 1)] = make_uint4(0, 0, 0, 0);
  }
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    uint4* cols = reinterpret_cast<uint4*>(smem.delta_cols[stage]);
    for (int col = threadIdx.x % 32; col < Traits::kCols; col += 32) cols[stat_chunk(col, 1)] = make_uint4(0, 0, 0, 0);
  }
}

// D of a query as three numbers of 16 bits, the largest first. Infinite D is all in the first.
template <class Element>
BROADHEAD_DEVICE uint4 delta_pieces(float delta) {
  const float2 first = unpack_pair<Element>(pack_pair<Element>(delta, 0.f));
  const float rest = fabsf(first.x) < INFINITY ? delta - first.x : 0.f;
  const std::uint32_t high = pack_pair<Element>(delta, rest);
  return make_uint4(high, pack_pair<Element>(rest - unpack_pair<Element>(high).y, 0.f), 0, 0);
}

// One warp: the stats of all steps. Where queries of a stage have no gradient their Q and dO become zeros: they may be
// NaN, and a weight of 0 does not hide that.
template <class Traits>
BROADHEAD_DEVICE void load_stats(const BackwardArgs& args, typename Traits::SharedStorage& smem) {
  const BackwardWork& work = smem.work;
  if constexpr (Traits::kDeltaColumns) clear_delta_columns<Traits>(smem);
  RingState<Traits::kStages> ring;
  for_each_step(work, [&](int head, int tile) {
    LaneStats<Traits::kCols / 32> stats;
    stats.load(args.params, work, head, tile * Traits::kCols);  // on their way while the stage is waited for
    const std::uint32_t stage = ring.stage();
    barrier_wait(smem.first_empty[stage], ring.parity() ^ 1);
    const auto store_delta = [&](int query, float delta) {
      if constexpr (Traits::kDeltaColumns) {
        reinterpret_cast<uint4*>(smem.delta_cols[stage])[stat_chunk(query, 0)] =
            delta_pieces<typename Traits::Element>(delta);
      } else {
        smem.delta[stage][stat_place<Traits::kPairedStats>(query)] = delta;
      }
    };
    const bool dead = stats.template store<Traits::kPairedStats>(work, smem.lse[stage], store_delta);
    if constexpr (Traits::kKeys) {  // behind the stats, whose registers it takes
      store_given<Traits::kRows, Traits::kCols>(work, tile * Traits::kCols, smem.given[stage]);
    }
    if (dead) {
      barrier_wait(smem.first_full[stage], ring.parity());
      barrier_wait(smem.second_full[stage], ring.parity());
      const auto is_dead = [&](int row) { return smem.lse[stage][stat_place<Traits::kPairedStats>(row)] == INFINITY; };
      clear_where<typename Traits::FirstCols, Traits::kCols>(smem.first_cols[stage], 0, 1, is_dead);
      clear_where<typename Traits::SecondCols, Traits::kCols>(smem.second_cols[stage], 0, 1, is_dead);
    }
    if (Traits::kDeltaColumns || dead) cutlass::arch::fence_view_async_shared();
    smem.stats_full[stage].arrive();
    ring.advance();
  });
}

// Warps 2 and 3: which queries see each key of the tile. In a fused kernel keys that no query sees become zeros: they
// may be NaN, and a dS of 0 does not hide that from dQ. PERF: a lane a key, once a tile. Consumers would divide 64-bit
// integers in every step that a mask cuts.
template <class Traits>
BROADHEAD_DEVICE void prepare_keys(typename Traits::SharedStorage& smem) {
  const BackwardWork& work = smem.work;
  if (work.range.begin >= work.range.end) return;
  const int thread = threadIdx.x - 64;
#pragma unroll 1
  for (int row = thread; row < Traits::kRows; row += 64) {
    const int key = work.first_row + row;
    QueryInterval seen = work.mask.query_interval(key, key);
    if (key >= work.end_row) seen = {0, 0};
    smem.seen[row] = seen;
  }
  __syncwarp();  // a warp clears the rows that its lanes wrote
  if constexpr (Traits::kFused) {
    barrier_wait(smem.rows_full[0], 0);
#pragma unroll 1
    for (int first = thread / 32 * 32; first < Traits::kRows; first += 64) {
      clear_where<typename Traits::FirstRows, 32>(
          smem.first_rows + first * (Traits::FirstRows::kRowBytes / static_cast<int>(sizeof(typename Traits::Element))),
          0, 1, [&](int row) {
            const int key = work.first_row + first + row;
            const bool given = key < work.end_row && work.extents.contains(key);
            return smem.seen[first + row].begin >= smem.seen[first + row].end && !given;
          });
    }
    cutlass::arch::fence_view_async_shared();
  }
  smem.keys_ready.arrive();
}

// One lane a consumer warpgroup: adds what it has computed of dQ in each step to the sums.
template <class Traits>
BROADHEAD_DEVICE void add_dq(const BackwardArgs& args, typename Traits::SharedStorage& smem, int warpgroup) {
  constexpr int kBytes = Traits::kDqTiles * 128 * static_cast<int>(sizeof(float4));
  constexpr int kFloats = kBytes / static_cast<int>(sizeof(float));
  const BackwardWork& work = smem.work;
  std::uint32_t parity = 0;
  for (int head = work.first_head; head < work.first_head + work.heads; ++head) {
    float* sums = dq_sums_of<typename Traits::DqSums>(args.dq_sums, args.params, work.seqlen, work.batch, head) +
                  warpgroup * kFloats;
    for (int tile = work.range.begin; tile < work.range.end; ++tile) {
      barrier_wait(smem.dq_full[warpgroup], parity);
      // PERF: one lane orders what 128 have written before the async proxy; each of them would wait for its stores.
      cutlass::arch::fence_view_async_shared();
      bulk_add(sums + static_cast<std::int64_t>(tile) * Traits::kConsumers * kFloats, smem_address(smem.dq[warpgroup]),
               kBytes);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();  // it has been read
      smem.dq_empty[warpgroup].arrive();
      parity ^= 1;
    }
  }
}

}  // namespace broadhead::sm90
