// The consumers of the Hopper kernel that keeps queries: dQ. Each warpgroup has 64 of them.
#pragma once

#include "common/gradient_rows.h"
#include "sm90/backward/mainloop.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct QueryConsumer {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using FirstCols = typename Traits::FirstCols;
  using SecondCols = typename Traits::SecondCols;

  const AttnBwdParams& params;
  Storage& smem;
  const int warpgroup = consumer_warpgroup();
  RingState<Traits::kStages> k_ring;
  RingState<Traits::kStages2> v_ring;

  // The lane's first query in the sequence.
  BROADHEAD_DEVICE int query() const { return smem.work.first_row + warpgroup * 64 + lane_row(); }

  // Waits for K. Its rows that no query of the tile sees become zeros: they may be NaN, and a dS of 0 does not hide
  // that. Those of V need it not: what they make of dP is never used. All consumers do it together.
  BROADHEAD_DEVICE void wait_k(int key0) {
    barrier_wait(smem.first_full[k_ring.stage()], k_ring.parity());
    if (smem.work.live.all(key0, Traits::kCols)) return;
    clear_together<FirstCols, Traits::kCols>(smem.first_cols[k_ring.stage()],
                                             [&](int row) { return !smem.work.live.contains(key0 + row); });
  }

  // Whether all queries of the tile see all keys of the step from `key0` on.
  BROADHEAD_DEVICE bool is_whole(int key0) const {
    return smem.work.template is_whole<Side::kQueries>(key0, Traits::kCols);
  }

  BROADHEAD_DEVICE void step(float (&dq)[Traits::kHeadDim / 8][4], const RowStats& lse, const RowStats& delta,
                             int key0) {
    Scores<Traits> s, dp;
    Weights<Traits> ds;
    wait_k(key0);
    issue_scores<typename Traits::FirstRows, FirstCols, Traits::kHeadDim>(s, smem.first_rows, warpgroup * 64,
                                                                          smem.first_cols[k_ring.stage()]);
    barrier_wait(smem.second_full[v_ring.stage()], v_ring.parity());
    issue_scores<typename Traits::SecondRows, SecondCols, Traits::kHeadDimV>(dp, smem.second_rows, warpgroup * 64,
                                                                             smem.second_cols[v_ring.stage()]);
    cute::warpgroup_wait<1>();
    fence_registers(s);
    const bool whole = is_whole(key0);
    exponentiate_step<Traits, false>(s, ds, lse, smem.work.scale, whole,
                                     [&] { return QueryMask(smem.work.mask, query(), key0); });
    fence_registers(s);
    cute::warpgroup_wait<0>();
    fence_registers(dp);
    release(smem.second_empty[v_ring.stage()]);
    v_ring.advance();
    differentiate<Element>(
        ds, [&](int n) { return make_float4(s[n][0], s[n][1], s[n][2], s[n][3]); }, dp, delta, whole);
    issue_gradient<FirstCols>(dq, ds, smem.first_cols[k_ring.stage()]);
    cute::warpgroup_wait<0>();
    fence_registers(dq);
    fence_registers(ds);
    release(smem.first_empty[k_ring.stage()]);
    k_ring.advance();
  }

  BROADHEAD_DEVICE void run() {
    const SeqlenInfo& seqlen = smem.work.seqlen;
    RowStats lse, delta;
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const QueryStats stats = load_query_stats(params, seqlen, smem.work.head, query() + 8 * i);
      lse.of_row[i] = stats.lse;
      delta.of_row[i] = stats.delta;
    }
    float dq[Traits::kHeadDim / 8][4];
    clear_accumulators(dq);
    const BlockRange range = smem.work.range;
    if (range.begin < range.end) {
      barrier_wait(smem.rows_full[0], 0);
      barrier_wait(smem.rows_full[1], 0);
    }
    for (int tile = range.begin; tile < range.end; ++tile) step(dq, lse, delta, tile * Traits::kCols);
    write_gradient(dq, params.softmax_scale,
                   gradient_rows<Element>(params.dq, params.dq_strides, seqlen.batch_q, seqlen.row_q, smem.work.head,
                                          seqlen.seqlen_q, params.head_dim),
                   query(), {lse.of_row[0] != INFINITY, lse.of_row[1] != INFINITY});
  }
};

}  // namespace broadhead::sm90
