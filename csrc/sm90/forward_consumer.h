// A consumer warpgroup of the forward kernel: 64 query rows, S = Q K^T, softmax, O += P V.
//
// S of block j and O += P V of the block before are in flight together, the softmax of j runs beside the latter.
#pragma once

#include "sm90/consumer_base.h"
#include "sm90/softmax.h"

namespace broadhead::sm90 {

template <class Traits>
struct Consumer final : ConsumerBase<Traits> {
  using Base = ConsumerBase<Traits>;
  using typename Base::Element;
  using VLayout = typename Traits::VLayout;
  using Base::args, Base::leader, Base::pass_turn, Base::q_parity, Base::release, Base::ring, Base::s, Base::smem;
  using Base::wait_full, Base::wait_turn, Base::warp_row, Base::warpgroup;
  using Softmax = LazySoftmax;
  using P = Probabilities<Element, Traits::kKeyTiles>;  // A operand of P V

  float o[Traits::kOTiles][4];
  Softmax softmax;

  using Base::Base;

  BROADHEAD_DEVICE void issue_pv(P& p, std::uint32_t stage) {
    fence_registers(o);
    fence_registers(p);
    const std::uint64_t b = MatrixDescriptor<VLayout::kRowBytes>::make(smem_address(smem.v[stage]), VLayout::kAtomBytes,
                                                                       VLayout::kSlabBytes);
    wgmma_fence();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kTileN / 16; ++step) {
      wgmma_rs<Element, Traits::kHeadDimV, Major::MN>(o, p[step], b + (step * 2 * VLayout::kSlabBytes >> 4), true);
    }
    wgmma_commit();
    fence_registers(o);
  }

  // V of the block before the one whose K is next.
  BROADHEAD_DEVICE void wait_v() { wait_full(smem.v_full[ring.stage(1)], ring.parity(1)); }

  // Clears what no query sees of that V, together with the other warpgroups: not in a turn, they may wait for it.
  BROADHEAD_DEVICE void prepare_v(const TileState<Element>& state, const BlockKinds& kinds, int block) {
    const int key0 = block * Traits::kTileN;
    if (kinds.plain(block) || all_live(state.source, key0, Traits::kTileN)) return;
    wait_v();
    const ClearShare share{static_cast<int>(threadIdx.x) / 32 - 4, Traits::kConsumerWarps, 0, VLayout::kBytes / 16};
    clear_dead_rows<VLayout>(state.source, reinterpret_cast<char*>(smem.v[ring.stage(1)]), key0, Traits::kTileN, share);
    fence_async_shared();
    named_barrier_sync(kClearBarrier, 32 * Traits::kConsumerWarps);
  }

  // P of the block from S. True when O must be multiplied by `factor` before this block's P V is added.
  BROADHEAD_DEVICE bool exponentiate(P& p, const TileState<Element>& state, const BlockKinds& kinds, int block,
                                     float (&factor)[2], bool first) {
    if (!kinds.plain(block)) finish_scores(s, state, block * Traits::kTileN, warp_row());
    return softmax.template compute_p<Element>(p, s, kinds.scale_log2, factor, first);
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    softmax = Softmax();
    BROADHEAD_UNROLL
    for (int t = 0; t < Traits::kOTiles; ++t) o[t][0] = o[t][1] = o[t][2] = o[t][3] = 0.f;
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    run_blocks(state, range);
  }

  // S of `block` and O += P V of the block before it, whose P is `p`; leaves P of `block` in `next_p`. `last`: of the
  // tile.
  BROADHEAD_DEVICE void step(P& p, P& next_p, const TileState<Element>& state, const BlockKinds& kinds, int block,
                             bool last) {
    prepare_v(state, kinds, block + 1);
    wait_full(smem.k_full[ring.stage()], ring.parity());
    wait_turn();
    Base::issue_qk(ring.stage());
    wait_v();
    issue_pv(p, ring.stage(1));
    pass_turn();
    wgmma_wait<1>();
    fence_registers(s[0]);
    release(smem.k_empty[ring.stage()]);
    if (last) release(smem.q_empty);
    ring.advance();
    float factor[2];
    bool raised;
    if constexpr (Traits::kTwoP) {
      raised = exponentiate(next_p, state, kinds, block, factor, false);
    } else {
      if (!kinds.plain(block)) finish_scores(s, state, block * Traits::kTileN, warp_row());
      float found[2];
      softmax.block_max(s, found);
      raised = softmax.raise(found, kinds.scale_log2, factor);
      softmax.template exponentiate<0, Traits::kKeyTiles>(s, kinds.scale_log2, exp2_approx);
      fence_registers(s[0]);
    }
    // Behind a branch on the sums, or ptxas would move the wait ahead of the exponentials. All four warps wait at the
    // same instruction, as wgmma demands.
    // The two forms are one to us; of each ptxas makes good code in one place only (spills, C7512 in the other).
    const bool computed = is_computed(softmax.row_sum[0] + softmax.row_sum[1]);
    if constexpr (Traits::kTwoP) {
      if (computed) wgmma_wait<0>();
    } else {
      if (!computed) __trap();
      wgmma_wait<0>();
    }
    fence_registers(o);
    if (raised) scale_rows(o, factor[0], factor[1]);
    fence_registers(p);
    release(smem.v_empty[ring.stage(2)]);
    if constexpr (!Traits::kTwoP) pack_p(next_p);
  }

  BROADHEAD_DEVICE void pack_p(P& p) const {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; n += 2) {
      BROADHEAD_UNROLL
      for (int i = 0; i < 2; ++i) {
        pack_tiles<Element, Traits::kKeyTiles>(
            p, n, i, {s[0][n][2 * i], s[0][n][2 * i + 1], s[0][n + 1][2 * i], s[0][n + 1][2 * i + 1]});
      }
    }
  }

  BROADHEAD_DEVICE void last_pv(P& p, const TileState<Element>& state, const BlockKinds& kinds, int block) {
    prepare_v(state, kinds, block);
    wait_v();
    issue_pv(p, ring.stage(1));
    wgmma_wait<0>();
    fence_registers(o);
    release(smem.v_empty[ring.stage(1)]);
  }

  BROADHEAD_DEVICE void run_blocks(const TileState<Element>& state, BlockRange range) {
    const BlockKinds kinds(state, Traits::kTileN);
    P even_p, odd_p;  // of every other block: one is read by wgmma while the other is computed
    float factor[2];
    int block = range.end - 1;
    wait_full(smem.k_full[ring.stage()], ring.parity());
    wait_turn();
    Base::issue_qk(ring.stage());
    pass_turn();
    wgmma_wait<0>();
    fence_registers(s[0]);
    release(smem.k_empty[ring.stage()]);
    if (block == range.begin) release(smem.q_empty);
    ring.advance();
    exponentiate(even_p, state, kinds, block, factor, true);
    if constexpr (!Traits::kTwoP) {
      for (block -= 1; block >= range.begin; --block) {
        step(even_p, even_p, state, kinds, block, block == range.begin);
      }
      last_pv(even_p, state, kinds, range.begin);
    } else {
      for (block -= 1; block > range.begin; block -= 2) {
        step(even_p, odd_p, state, kinds, block, false);
        step(odd_p, even_p, state, kinds, block - 1, block - 1 == range.begin);
      }
      if (block == range.begin) step(even_p, odd_p, state, kinds, block, true);
      if (block == range.begin) {
        last_pv(odd_p, state, kinds, range.begin);
      } else {
        last_pv(even_p, state, kinds, range.begin);
      }
    }
  }

  BROADHEAD_DEVICE void write_tile(const TileState<Element>& state, int split) {
    const SeqlenInfo seqlen = state.seqlen;
    const ScoreScale& scale = state.scale;
    const int thread = fresh_thread();
    const int row0 = (thread / 32 - 4) * 16 + thread % 32 / 4;
    const RowPlace rows[2] = {place_row(state.output, row0), place_row(state.output, row0 + 8)};
    softmax.reduce_sum();
    float inverse[2];
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const RowResult result =
          finish_row<Element>(args.params, rows[i], {softmax.row_max[i], softmax.row_sum[i]}, scale, split);
      inverse[i] = result.inverse;
      if (thread % 4 == 0) write_lse(args.params, seqlen, rows[i], result.lse, split);
    }
    if (split < 0) {
      write_output<Element>(args, seqlen, rows, o, inverse, 0);
    } else {
      write_partial(args, seqlen, rows, o, inverse, 0, split);
    }
  }
};

}  // namespace broadhead::sm90
