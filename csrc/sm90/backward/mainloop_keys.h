// The consumers of the Hopper kernel that keeps keys: dK and dV.
//
//   128 keys: each warpgroup computes everything of its 64:  S^T, dP^T | P | dS | dV += P^T dO, dK += dS^T Q
//    64 keys: warpgroup 0:  S^T | P -> shared memory, dV += P^T dO     warpgroup 1:  dP^T | dS | dK += dS^T Q
//
// While one warpgroup computes P or dS, the other has products to multiply. With 64 keys the scores of the next step
// are issued behind the gradient of this one.
#pragma once

#include "common/gradient_rows.h"
#include "sm90/backward/mainloop.h"

namespace broadhead::sm90 {

using namespace tma;

// Named barriers of kSplitProducts; see consumer.h for others.
constexpr int kPFullBarrier = 1;   // P of a step is in shared memory
constexpr int kPEmptyBarrier = 2;  // and has been read

template <class Traits>
struct KeyConsumer {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using FirstCols = typename Traits::FirstCols;
  using SecondCols = typename Traits::SecondCols;

  const AttnBwdParams& params;
  Storage& smem;
  const int warpgroup = consumer_warpgroup();
  // Read once: the instruction that reads it takes longer than what follows from it takes to compute again.
  const unsigned thread_ = fresh_thread();
  RingState<Traits::kStages> ring;

  BROADHEAD_DEVICE unsigned thread() const {
    if constexpr (Traits::kKeepsThread) {
      return thread_;
    } else {
      return fresh_thread();
    }
  }

  // The warpgroup's first key in the tile.
  BROADHEAD_DEVICE int first_row() const { return Traits::kSplitProducts ? 0 : warpgroup * 64; }

  // The lane's first key in the sequence.
  BROADHEAD_DEVICE int key() const { return smem.work.first_row + first_row() + lane_row(); }

  BROADHEAD_DEVICE void wait_first() { barrier_wait(smem.first_full[ring.stage()], ring.parity()); }
  BROADHEAD_DEVICE void wait_second() { barrier_wait(smem.second_full[ring.stage()], ring.parity()); }

  // Waits for Q, its LSE and its D.
  BROADHEAD_DEVICE void wait_queries() {
    barrier_wait(smem.stats_full[ring.stage()], ring.parity());
    wait_first();
  }

  BROADHEAD_DEVICE void release_stage(std::uint32_t stage) {
    release(smem.first_empty[stage]);
    release(smem.second_empty[stage]);
  }

  // K for S, V for dP, of the warpgroup's keys: the steps that stay in registers.
  using KeptK = std::uint32_t[max_int(Traits::kKeptSteps, 1)][4];
  using KeptV = std::uint32_t[max_int(Traits::kKeptStepsV, 1)][4];

  template <class Rows, int kSteps>
  BROADHEAD_DEVICE void keep(std::uint32_t (&kept)[kSteps][4], const Element* rows) const {
    if constexpr (Traits::kKeptSteps > 0) {
      BROADHEAD_UNROLL
      for (int step = 0; step < kSteps; ++step) ldmatrix_x4(kept[step], matrix_of<Rows>(rows, first_row(), step));
    }
  }

  BROADHEAD_DEVICE void issue_s(Scores<Traits>& s, const KeptK& kept) {
    issue_scores<typename Traits::FirstRows, FirstCols, Traits::kHeadDim, Traits::kKeptSteps>(
        s, smem.first_rows, first_row(), smem.first_cols[ring.stage()], kept);
  }
  BROADHEAD_DEVICE void issue_dp(Scores<Traits>& dp, const KeptV& kept) {
    const auto take_delta = [&] {
      if constexpr (Traits::kDeltaColumns) {
        using Rows = typename Traits::StatRows;
        using Cols = typename Traits::StatCols;
        wgmma_ss<Element, Traits::kCols, Major::K>(
            dp, MatrixDescriptor<Rows::kRowBytes>::make(smem_address(smem.minus_ones), 0, Rows::kSlabStride),
            MatrixDescriptor<Cols::kRowBytes>::make(smem_address(smem.delta_cols[ring.stage()]), 0, Cols::kSlabStride),
            true);
      }
    };
    issue_scores<typename Traits::SecondRows, SecondCols, Traits::kHeadDimV, Traits::kKeptStepsV>(
        dp, smem.second_rows, first_row(), smem.second_cols[ring.stage()], kept, take_delta);
  }

  using EarlyLse = ColumnStats<Traits::kEarlyLse, Traits::kPairedStats>;
  using EarlyDelta =
      std::conditional_t<Traits::kDeltaColumns, NoStats, ColumnStats<Traits::kEarlyDelta, Traits::kPairedStats>>;

  // S is there, and dP on its way; but with a softcap P takes the registers of dP.
  BROADHEAD_DEVICE EarlyLse issue_both(Scores<Traits>& s, Scores<Traits>& dp, const KeptK& k, const KeptV& v) {
    wait_queries();
    issue_s(s, k);
    const auto early = lse<EarlyLse>();
    wait_second();
    if constexpr (!Traits::kCapped) issue_dp(dp, v);
    cute::warpgroup_wait<Traits::kCapped ? 0 : 1>();
    fence_registers(s);
    return early;
  }

  BROADHEAD_DEVICE static void wait_dp(Scores<Traits>& dp) {
    cute::warpgroup_wait<0>();
    fence_registers(dp);
  }

  template <class Stats = ColumnStats<0, Traits::kPairedStats>>
  BROADHEAD_DEVICE Stats lse() const {
    return {smem.lse[ring.stage()], lane_col(thread())};
  }
  template <class Stats = ColumnStats<0, Traits::kPairedStats>>
  BROADHEAD_DEVICE Stats delta() const {
    return {smem.delta[ring.stage()], lane_col(thread())};
  }

  // What every step asks of the tile, in registers: the queries that meet all its keys, and the scale. With a softcap
  // there are no registers for that.
  struct Uniform {
    Columns whole;
    std::conditional_t<Traits::kCapped, const ScoreScale&, const ScoreScale> scale;

    // Whether all keys of the tile meet all queries of the step from `query0` on.
    BROADHEAD_DEVICE bool is_whole(int query0) const {
      return query0 >= whole.begin && query0 + Traits::kCols <= whole.end;
    }
  };

  // Queries past the end of the sequence have no gradients; keys past it have some that nobody writes, but dQ must not
  // take them.
  BROADHEAD_DEVICE Uniform uniform() const {
    const BackwardWork& work = smem.work;
    const bool partial = Traits::kFused && work.first_row + Traits::kRows > work.end_row;
    const int end = work.whole.end >= work.seqlen.seqlen_q ? INT32_MAX : work.whole.end;
    return {{work.whole.begin, partial ? 0 : end}, work.scale};
  }

  template <class Lse>
  BROADHEAD_DEVICE void compute_p(Scores<Traits>& s, Weights<Traits>& p, const Lse& lse, const Uniform& uniform,
                                  int query0) {
    exponentiate_step<Traits, true>(s, p, lse, uniform.scale, uniform.is_whole(query0), [&] {
      return KeyMask<Traits::kCols>(smem.work, smem.seen, smem.given[ring.stage()], first_row() + lane_row(thread()),
                                    query0);
    });
  }

  // What compute_p leaves in place: P, times a softcap's slope.
  BROADHEAD_DEVICE void pack_weights(const Scores<Traits>& s, Weights<Traits>& weights) const {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; ++n) pack_tile<Element>(weights, n, s[n]);
  }

  template <class P, class Delta>
  BROADHEAD_DEVICE void compute_ds(Weights<Traits>& ds, const P& p, const Scores<Traits>& dp, const Delta& delta,
                                   const Uniform& uniform, int query0) {
    differentiate<Element>(ds, p, dp, delta, uniform.is_whole(query0));
  }

  // A range of tiles of queries, in registers: to read it in each step took 9 % of the time at head_dim 128. See
  // Uniform.
  using Range = std::conditional_t<Traits::kCapped, const BlockRange&, const BlockRange>;

  // Calls `step(first query)` for each tile of queries of each head.
  template <class Step>
  BROADHEAD_DEVICE void for_each_tile(const Step& step) {
    Range range = smem.work.range;
    int tile = range.begin;
    for (int left = (range.end - tile) * smem.work.heads; left > 0; --left) {
      step(tile * Traits::kCols);
      if (++tile == range.end) tile = range.begin;
    }
  }

  // The same, of at least one tile. `step(last, first query)`: `last` is a type that says so.
  template <class Step>
  BROADHEAD_DEVICE void for_each_tile_but_last(const Step& step) {
    Range range = smem.work.range;
    int tile = range.begin;
    for (int left = (range.end - tile) * smem.work.heads; left > 1; --left) {
      step(std::false_type{}, tile * Traits::kCols);
      if (++tile == range.end) tile = range.begin;
    }
    step(std::true_type{}, tile * Traits::kCols);
  }

  template <int kTiles>
  BROADHEAD_DEVICE void write(const float (&gradient)[kTiles][4], float factor, void* tensor,
                              const TensorStrides& strides, int columns) const {
    const SeqlenInfo& seqlen = smem.work.seqlen;
    write_gradient(
        gradient, factor,
        gradient_rows<Element>(tensor, strides, seqlen.batch_k, seqlen.row_k, smem.work.head, seqlen.seqlen_k, columns),
        key(), {true, true});
  }
  BROADHEAD_DEVICE void write_dk(const float (&dk)[Traits::kHeadDim / 8][4]) const {
    write(dk, params.softmax_scale, params.dk, params.dk_strides, params.head_dim);
  }
  BROADHEAD_DEVICE void write_dv(const float (&dv)[Traits::kHeadDimV / 8][4]) const {
    write(dv, 1.f, params.dv, params.dv_strides, params.head_dim_v);
  }

  // All of 64 keys.
  BROADHEAD_DEVICE void run_all() {
    float dk[Traits::kHeadDim / 8][4], dv[Traits::kHeadDimV / 8][4];
    clear_accumulators(dk);
    clear_accumulators(dv);
    if (has_steps(smem.work)) {
      barrier_wait(smem.keys_ready, 0);
      barrier_wait(smem.rows_full[0], 0);
      barrier_wait(smem.rows_full[1], 0);
      KeptK k;
      KeptV v;
      const Uniform uniform = this->uniform();
      for_each_tile([&](int query0) { step_all(dk, dv, k, v, uniform, query0); });
    }
    write_dk(dk);
    write_dv(dv);
  }

  // P and dS of a step. Nothing is on its way then: a warp that hands registers to wgmma waits until the tensor cores
  // take them, so that no product before dS would run beside its computation.
  BROADHEAD_DEVICE void compute_weights(Weights<Traits>& p, Weights<Traits>& ds, const KeptK& k, const KeptV& v,
                                        const Uniform& uniform, int query0) {
    Scores<Traits> s, dp;
    const EarlyLse early = issue_both(s, dp, k, v);
    if constexpr (Traits::kPackLate) {
      if (uniform.is_whole(query0)) {
        exponentiate<Element, false, false>(s, p, early, uniform.scale, NoMask{});
        fence_registers(s);  // the exponentials run beside dP, not behind it
        const auto d = delta<EarlyDelta>();
        wait_dp(dp);
        differentiate<Element>(ds, AccumulatedWeights<Traits::kColTiles>{s}, dp, d, true);
        pack_weights(s, p);
        return;
      }
    }
    Weights<Traits> slopes;
    if constexpr (!Traits::kCapped) {
      compute_p(s, p, early, uniform, query0);
    } else {
      compute_p(s, p, lse<EarlyLse>(), uniform, query0);
      if constexpr (Traits::kPackedWeights) pack_weights(s, slopes);
      issue_dp(dp, v);
      wait_dp(dp);
    }
    const auto d = delta<EarlyDelta>();
    if constexpr (!Traits::kCapped) wait_dp(dp);
    if (Traits::kDeltaColumns && uniform.is_whole(query0)) {
      multiply_packed(ds, p, dp);
    } else if constexpr (Traits::kPackedWeights) {
      const auto& weights = Traits::kCapped ? slopes : p;
      compute_ds(ds, PackedWeights<Element, Traits::kWeightSteps>{weights}, dp, d, uniform, query0);
    } else {
      compute_ds(ds, AccumulatedWeights<Traits::kColTiles>{s}, dp, d, uniform, query0);
    }
  }

  BROADHEAD_DEVICE void step_all(float (&dk)[Traits::kHeadDim / 8][4], float (&dv)[Traits::kHeadDimV / 8][4],
                                 const KeptK& k, const KeptV& v, const Uniform& uniform, int query0) {
    Weights<Traits> p, ds;
    compute_weights(p, ds, k, v, uniform, query0);
    issue_gradient<SecondCols>(dv, p, smem.second_cols[ring.stage()]);
    issue_gradient<FirstCols>(dk, ds, smem.first_cols[ring.stage()]);
    cute::warpgroup_wait<0>();
    fence_registers(dv);
    fence_registers(dk);
    fence_registers(p);
    fence_registers(ds);
    release_stage(ring.stage());
    ring.advance();
  }

  // The end of a step of one product of scores and one gradient: `gradient` has been issued for the stage, which is
  // released; the scores of the next step have been when this returns.
  template <class Last, int kTiles, class Issue>
  BROADHEAD_DEVICE void finish_step(Last, float (&gradient)[kTiles][4], Weights<Traits>& weights,
                                    Scores<Traits>& scores, const Issue& issue_next) {
    const std::uint32_t stage = ring.stage();
    ring.advance();
    if constexpr (!Last::value) issue_next();
    cute::warpgroup_wait<Last::value ? 0 : 1>();
    fence_registers(gradient);
    fence_registers(weights);
    release_stage(stage);
    if constexpr (!Last::value) {
      cute::warpgroup_wait<0>();
      fence_registers(scores);
    }
  }

  // S, P and dV. S of the next step is multiplied behind dV.
  BROADHEAD_DEVICE void run_dv() {
    float dv[Traits::kHeadDimV / 8][4];
    clear_accumulators(dv);
    if (has_steps(smem.work)) {
      barrier_wait(smem.keys_ready, 0);
      barrier_wait(smem.rows_full[0], 0);
      const Uniform uniform = this->uniform();
      KeptK kept;
      keep<typename Traits::FirstRows>(kept, smem.first_rows);
      Scores<Traits> s;
      const auto issue = [&] {
        wait_queries();
        issue_s(s, kept);
      };
      issue();
      cute::warpgroup_wait<0>();
      fence_registers(s);
      for_each_tile_but_last([&](auto last, int query0) {
        Weights<Traits> p;
        compute_p(s, p, lse(), uniform, query0);
        NamedBarrier::sync(256, hardware_id(kPEmptyBarrier));
        Weights<Traits> slopes;
        if constexpr (Traits::kCapped) pack_weights(s, slopes);
        const auto& weights = Traits::kCapped ? slopes : p;
        BROADHEAD_UNROLL
        for (int step = 0; step < Traits::kWeightSteps; ++step) {
          const auto& w = weights[step];
          smem.p[step * 128 + threadIdx.x % 128] = make_uint4(w[0], w[1], w[2], w[3]);
        }
        NamedBarrier::arrive(256, hardware_id(kPFullBarrier));
        wait_second();
        issue_gradient<SecondCols>(dv, p, smem.second_cols[ring.stage()]);
        finish_step(last, dv, p, s, issue);
      });
    }
    write_dv(dv);
  }

  // dP, dS and dK. dP of the next step is multiplied behind dK.
  BROADHEAD_DEVICE void run_dk() {
    float dk[Traits::kHeadDim / 8][4];
    clear_accumulators(dk);
    if (has_steps(smem.work)) {
      barrier_wait(smem.rows_full[1], 0);
      const Uniform uniform = this->uniform();
      KeptV kept;
      keep<typename Traits::SecondRows>(kept, smem.second_rows);
      Scores<Traits> dp;
      const auto issue = [&] {
        wait_queries();
        wait_second();
        issue_dp(dp, kept);
      };
      NamedBarrier::arrive(256, hardware_id(kPEmptyBarrier));
      issue();
      cute::warpgroup_wait<0>();
      fence_registers(dp);
      for_each_tile_but_last([&](auto last, int query0) {
        Weights<Traits> ds;
        NamedBarrier::sync(256, hardware_id(kPFullBarrier));
        Weights<Traits> p;
        BROADHEAD_UNROLL
        for (int step = 0; step < Traits::kWeightSteps; ++step) {
          const uint4 w = smem.p[step * 128 + threadIdx.x % 128];
          p[step][0] = w.x, p[step][1] = w.y, p[step][2] = w.z, p[step][3] = w.w;
        }
        compute_ds(ds, PackedWeights<Element, Traits::kWeightSteps>{p}, dp, delta(), uniform, query0);
        NamedBarrier::arrive(256, hardware_id(kPEmptyBarrier));
        issue_gradient<FirstCols>(dk, ds, smem.first_cols[ring.stage()]);
        finish_step(last, dk, ds, dp, issue);
      });
    }
    write_dk(dk);
  }

  BROADHEAD_DEVICE void run() {
    if constexpr (!Traits::kSplitProducts) {
      run_all();
    } else if (warpgroup == 0) {
      run_dv();
    } else {
      run_dk();
    }
  }
};

}  // namespace broadhead::sm90
