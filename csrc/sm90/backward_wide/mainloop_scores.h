// The score warpgroup of a CTA of the wide Hopper backward kernels: S and P (rank 0), or dP and dS (rank 1).
//
// It works ahead of the gradient warpgroups, as far as the buffers of both CTAs allow: scores of a step overlap the
// gradients of the one before.
#pragma once

#include "common/gradient_rows.h"
#include "sm90/backward/mainloop.h"
#include "sm90/backward_wide/load.h"

namespace broadhead::sm90 {

using namespace tma;

constexpr int kSeenBarrier = 1;  // PairScores::prepare_keys

// A warpgroup's share of what is sent: 64 x 64 weights, packed. Lanes of a quad exchange words, so that each stores 16
// bytes. `tile`, `received`: the buffer and its barrier, in the cluster's window.
template <class Layout, int kSteps>
BROADHEAD_DEVICE void send_weights(const std::uint32_t (&weights)[kSteps][4], std::uint32_t tile,
                                   std::uint32_t received) {
  const int row = lane_row();
  const int quad = fresh_thread() % 4;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2; ++i) {
    BROADHEAD_UNROLL
    for (int t = 0; t < 2 * kSteps; t += 4) {
      std::uint32_t words[4];
      BROADHEAD_UNROLL
      for (int u = 0; u < 4; ++u) words[u] = weights[(t + u) / 2][(t + u) % 2 * 2 + i];
      const int chunk = (t + quad) ^ (row % 8);
      store_async_cluster(tile + (row + 8 * i) * Layout::kRowBytes + chunk * 16, transpose_quad(words, quad), received);
    }
  }
}

template <class Traits>
struct PairScores {
  using Element = typename Traits::Element;
  using Chunk = typename Traits::Chunk;
  using WeightLayout = typename Traits::WeightLayout;

  const AttnBwdParams& params;
  typename Traits::SharedStorage& smem;
  RingState<Traits::kStages> ring;
  RingState<2> slot;  // of what is sent and received
  std::uint32_t kept[Traits::kRegisterSteps][4];

  // The lane's first row in the sequence.
  BROADHEAD_DEVICE int row() const { return smem.work.first_row + lane_row(); }

  BROADHEAD_DEVICE void load_rows() {
    barrier_wait(smem.rows_full, 0);
    BROADHEAD_UNROLL
    for (int i = 0; i < Traits::kRegisterSteps; ++i) {
      const int chunk = i / Chunk::kSteps;
      ldmatrix_x4(kept[i],
                  matrix_of<typename Traits::Rows>(smem.rows, 0, Traits::first_column(chunk) / 16 + i % Chunk::kSteps));
    }
  }

  // scores = rows x columns^T of a step, complete.
  BROADHEAD_DEVICE void multiply(Scores<Traits>& scores) {
    using Descriptor = MatrixDescriptor<128>;
    using Rows = typename Traits::Rows;
    barrier_wait(smem.prepared[ring.stage()], ring.parity());
    const std::uint64_t a = Descriptor::make(smem_address(smem.rows), 0, Rows::kSlabStride);
    clear_accumulators(scores);  // tells the compiler that they hold nothing of use
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
      barrier_wait(smem.chunk_full[ring.stage()][chunk], ring.parity());
      const std::uint64_t b = Descriptor::make(smem_address(smem.chunks[ring.stage()][chunk]), 0, Chunk::kSlabStride);
      cute::warpgroup_arrive();
      BROADHEAD_UNROLL
      for (int step = 0; step < Chunk::kSteps; ++step) {
        const int row_step = Traits::first_column(chunk) / 16 + step;
        const std::uint64_t b_step = b + (Chunk::step_offset(step, Chunk::kSubtileStride) >> 4);
        if (chunk < Traits::kRegisterChunks) {
          wgmma_rs<Element, Traits::kCols, Major::K>(scores, kept[chunk * Chunk::kSteps + step], b_step,
                                                     chunk + step > 0);
        } else {
          wgmma_ss<Element, Traits::kCols, Major::K>(
              scores, a + (Rows::step_offset(row_step, Rows::kSubtileStride) >> 4), b_step, true);
        }
      }
      cute::warpgroup_commit_batch();
    }
    fence_registers(scores);
    cute::warpgroup_wait<0>();
    fence_registers(scores);
  }

  // The stage has been read, and what was computed of its stats.
  BROADHEAD_DEVICE void release_stage() {
    if constexpr (Traits::kKeys) release(smem.stats_empty[ring.stage()]);
    if (fresh_thread() % 128 == 0) {
      BROADHEAD_UNROLL
      for (int chunk = 0; chunk < Traits::kChunks; ++chunk) smem.chunk_empty[ring.stage()][chunk].arrive();
    }
    ring.advance();
  }

  // Hands weights to CTA `peer`, once those of two steps ago have been read there.
  BROADHEAD_DEVICE void send(const Weights<Traits>& weights, const Element* tile, int peer) const {
    send_weights<WeightLayout>(weights, cute::set_block_rank(smem_address(tile), peer),
                               cute::set_block_rank(smem_address(&smem.received[slot.stage()]), peer));
  }
  BROADHEAD_DEVICE void wait_sent() const { barrier_wait(smem.sent_read[slot.stage()], slot.parity() ^ 1); }

  // Which queries see each key of the tile: steps need not divide 64-bit integers.
  BROADHEAD_DEVICE void prepare_keys() const {
    const int thread = fresh_thread() % 128;
    if (thread < Traits::kRows) {
      const int key = smem.work.first_row + thread;
      smem.seen[thread] = smem.work.mask.query_interval(key, key);
    }
    NamedBarrier::sync(128, hardware_id(kSeenBarrier));
  }

  BROADHEAD_DEVICE auto make_mask(int col0) const {
    if constexpr (Traits::kKeys) {
      return KeyMask<Traits::kCols>(smem.work, smem.seen, smem.beside.given[ring.stage()], lane_row(), col0);
    } else {
      return QueryMask(smem.work.mask, row(), col0);
    }
  }

  // P of each step goes to CTA 1, and with a softcap P times its slope.
  template <class Stats>
  BROADHEAD_DEVICE void run_p(const Stats& lse_of) {
    if constexpr (Traits::kKeys) prepare_keys();
    load_rows();
    for_each_step(smem.work, [&](int, int tile) {
      Scores<Traits> s;
      Weights<Traits> p;
      multiply(s);
      const int col0 = tile * Traits::kCols;
      exponentiate_step<Traits, true>(s, p, lse_of(ring.stage()), smem.work.scale,
                                      smem.work.template is_whole<Traits::kSide>(col0, Traits::kCols),
                                      [&] { return make_mask(col0); });
      release_stage();
      wait_sent();
      if constexpr (!Traits::kCapped || Traits::kSendsSlope) send(p, smem.weights[slot.stage()], 1);
      if constexpr (Traits::kCapped) {
        BROADHEAD_UNROLL
        for (int n = 0; n < Traits::kColTiles; ++n) pack_tile<Element>(p, n, s[n]);
        send(p, Traits::kSendsSlope ? smem.beside.slopes[slot.stage()] : smem.weights[slot.stage()], 1);
      }
      slot.advance();
    });
  }

  // P of a step, or P times the slope, as the accumulators lie.
  BROADHEAD_DEVICE void read_p(Weights<Traits>& p) {
    Barrier& received = smem.received[slot.stage()];
    barrier_wait(received, slot.parity());
    if (fresh_thread() % 128 == 0) received.arrive_and_expect_tx(Traits::received_bytes(1));  // the next ones
    const Element* tile = Traits::kSendsSlope ? smem.beside.slopes[slot.stage()] : smem.weights[slot.stage()];
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kWeightSteps; ++step)
      ldmatrix_x4(p[step], matrix_of<WeightLayout>(tile, 0, step));
  }

  // dS of each step goes to CTA 0.
  template <class Stats>
  BROADHEAD_DEVICE void run_ds(const Stats& delta_of) {
    load_rows();
    for_each_step(smem.work, [&](int, int tile) {
      Scores<Traits> dp;
      Weights<Traits> p, ds;
      multiply(dp);
      read_p(p);
      differentiate<Element>(ds, PackedWeights<Element, Traits::kWeightSteps>{p}, dp, delta_of(ring.stage()),
                             smem.work.template is_whole<Traits::kSide>(tile * Traits::kCols, Traits::kCols));
      release_stage();
      // P was used: it has been read for certain, whatever order an arrival in the other CTA has.
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive_cluster(smem.sent_read[slot.stage()], 0, 1);
      wait_sent();
      send(ds, smem.weights[slot.stage()], 0);
      slot.advance();
    });
  }

  BROADHEAD_DEVICE void run(std::uint32_t rank) {
    if constexpr (Traits::kKeys) {
      if (rank == 0) {
        run_p([&](std::uint32_t stage) { return ColumnStats<>(smem.lse[stage], lane_col()); });
      } else {
        run_ds([&](std::uint32_t stage) { return ColumnStats<>(smem.delta[stage], lane_col()); });
      }
    } else {
      const BackwardWork& work = smem.work;
      const QueryStats upper = load_query_stats(params, work.seqlen, work.head, row());
      const QueryStats lower = load_query_stats(params, work.seqlen, work.head, row() + 8);
      if (rank == 0) {
        run_p([&](std::uint32_t) { return RowStats{upper.lse, lower.lse}; });
      } else {
        run_ds([&](std::uint32_t) { return RowStats{upper.delta, lower.delta}; });
      }
    }
  }
};

}  // namespace broadhead::sm90
