// A consumer warpgroup of the e4m3 kernel: 64 query rows, S = Q K^T, softmax to e4m3 P, O += P V in two levels.
//
// Warpgroups ping-pong: one issues P V of an n_block and S of the next while the others compute their softmax.
#pragma once

#include "common/accumulator.h"
#include "sm90/consumer_base.h"
#include "sm90/epilogue.h"
#include "sm90/forward_fp8/traits.h"
#include "sm90/softmax.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct Fp8Consumer final : ConsumerBase<Traits> {
  using Base = ConsumerBase<Traits>;
  using typename Base::Element;
  using OutElement = typename Traits::OutElement;
  using Layout = typename Traits::TransposedLayout;
  using Base::args, Base::leader, Base::ping_pong_pass, Base::q_parity, Base::release, Base::ring, Base::s, Base::smem;
  using Base::wait_full, Base::ping_pong_wait, Base::warp_row, Base::warpgroup;
  using Softmax = BlockSoftmax<true>;
  static constexpr int kPartTiles = Traits::kPartCols / 8;

  Probabilities<Element, Traits::kKeyTiles> p;  // A operand of P V
  float o[Traits::kParts][kPartTiles][4];
  float factor[2];  // of O, before P V of the n_block is added
  Softmax softmax;

  using Base::Base;

  // `product` = P V of the n_block, of one part of the columns.
  BROADHEAD_DEVICE void issue_pv(float (&product)[kPartTiles][4], std::uint32_t stage, int part) {
    const std::uint64_t b = MatrixDescriptor<Layout::kRowBytes>::make(
        smem_address(smem.transposed_v[stage]) + part * kPartTiles * Layout::kSlabBytes, 0, Layout::kSlabBytes);
    if constexpr (Traits::kInScores) {
      fence_registers(product);  // those of S
    } else {
      clear_accumulators(product);  // as in issue_qk
    }
    fence_registers(p);
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < Layout::kSteps; ++step) {
      wgmma_rs<Element, Traits::kPartCols, Major::K>(
          product, p[step], b + (Layout::step_offset(step, Layout::kAtomBytes) >> 4), step > 0);
    }
    cute::warpgroup_commit_batch();
    fence_registers(product);
  }

  // P of the n_block whose S is in flight; waits for its V. `some_missing`: what some_missing says of its K.
  BROADHEAD_DEVICE void take_scores(const TileState<Element>& state, const BlockKinds& kinds, int block,
                                    bool some_missing) {
    cute::warpgroup_wait<0>();
    fence_registers(s[0]);
    if (some_missing) Base::hide_missing_keys(ring.stage());
    release(smem.k_empty[ring.stage()]);
    ring.advance();
    if (!kinds.plain(block)) finish_scores<Traits>(s, state, first_key_of<Traits>(state, block), warp_row());
    softmax.template compute_p_exactly<Element>(p, s, kinds.scale_log2, factor);
    fence_registers(p);  // or the compiler would move the exponentials behind ping_pong_wait
    barrier_wait(smem.transposed_full[ring.stage(1)], ring.parity(1));
  }

  // O = factor * O + P V, part by part. ptxas finds the registers of one part by itself.
  BROADHEAD_DEVICE void add_block() {
    const std::uint32_t stage = ring.stage(1);
    BROADHEAD_UNROLL
    for (int part = 0; part < Traits::kParts; ++part) {
      float own[kPartTiles][4];
      auto& product = *(Traits::kInScores ? reinterpret_cast<float (*)[kPartTiles][4]>(s[0]) : &own);
      issue_pv(product, stage, part);
      cute::warpgroup_wait<0>();
      fence_registers(product);
      BROADHEAD_UNROLL
      for (int t = 0; t < kPartTiles; ++t) {
        BROADHEAD_UNROLL
        for (int c = 0; c < 4; ++c) o[part][t][c] = fmaf(o[part][t][c], factor[c / 2], product[t][c]);
      }
    }
    release(smem.transposed_empty[stage]);
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    softmax = Softmax();
    clear_accumulators(o);
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    const BlockKinds kinds(state, Traits::kTileN, Traits::kPlainCall);
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    wait_full(smem.k_full[ring.stage()], ring.parity());
    bool some_missing = Base::some_missing(ring.stage());
    ping_pong_wait();
    Base::issue_qk(ring.stage());
    ping_pong_pass();
    for (int block = range.end - 1;; --block) {
      take_scores(state, kinds, block, some_missing);
      const bool last = block == range.begin;
      if (!last) {
        wait_full(smem.k_full[ring.stage()], ring.parity());
        some_missing = Base::some_missing(ring.stage());
      }
      ping_pong_wait();
      add_block();
      if (last) break;
      Base::issue_qk(ring.stage());
      ping_pong_pass();
    }
    ping_pong_pass();
    release(smem.q_empty);
  }

  BROADHEAD_DEVICE void write_tile(const TileState<Element>& state, int split) {
    const int thread = fresh_thread();
    RowPlace rows[2];
    place_rows(rows, state.output, (thread / 32 - 4) * 16 + thread % 32 / 4);
    softmax.reduce_sum();
    constexpr float kUnit = 1.f / 256.f;  // 2^-Softmax::kShift: P was that much larger
    float inverse[2];
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const RowResult result = finish_row<OutElement>(
          args.params, rows[i], {softmax.row_max[i], softmax.row_sum[i] * kUnit}, state.scale, split);
      inverse[i] = result.inverse * (kUnit * state.scale.v_factor);
      if (thread % 4 == 0) write_lse(args.params, state.seqlen, rows[i], result.lse, split);
    }
    drop_empty(rows, inverse[0] == 0.f, inverse[1] == 0.f, split);
    BROADHEAD_UNROLL
    for (int part = 0; part < Traits::kParts; ++part) {
      scale_rows(o[part], inverse[0], inverse[1]);
      write_rows<OutElement>(args.params, state.seqlen, rows, o[part], part * Traits::kPartCols, split);
    }
  }
};

}  // namespace broadhead::sm90
