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
  template <bool kPlain>
  BROADHEAD_DEVICE bool exponentiate(P& p, const TileState<Element>& state, const BlockKinds& kinds, int block,
                                     float (&factor)[2], bool first) {
    if (!kPlain && !kinds.plain(block)) finish_scores(s, state, block * Traits::kTileN, warp_row());
    return softmax.template compute_p<Element>(p, s, kinds.scale_log2, factor, first);
  }

  // Q and K of a tile's first block.
  BROADHEAD_DEVICE void wait_first() {
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    wait_full(smem.k_full[ring.stage()], ring.parity());
  }

  // S of `block` and O += P V of the block before it, whose P is `p`; leaves P of `block` in `next_p`. `last`: of the
  // tile. kPlain: neither of the two needs a mask, and it is not the last; the code of most blocks stays in one piece.
  template <bool kPlain>
  BROADHEAD_DEVICE void step(P& p, P& next_p, const TileState<Element>& state, const BlockKinds& kinds, int block,
                             bool last) {
    if constexpr (!kPlain) prepare_v(state, kinds, block + 1);
    wait_full(smem.k_full[ring.stage()], ring.parity());
    wait_turn();
    Base::issue_qk(ring.stage());
    wait_v();
    issue_pv(p, ring.stage(1));
    pass_turn();
    wgmma_wait<1>();
    fence_registers(s[0]);
    release(smem.k_empty[ring.stage()]);
    if (!kPlain && last) release(smem.q_empty);
    ring.advance();
    float factor[2];
    bool raised;
    if constexpr (Traits::kTwoP) {
      raised = exponentiate<kPlain>(next_p, state, kinds, block, factor, false);
    } else {
      if (!kPlain && !kinds.plain(block)) finish_scores(s, state, block * Traits::kTileN, warp_row());
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

  // The tile's first block: S is in flight, P comes into even_p.
  BROADHEAD_DEVICE void first_block(P& even_p, const TileState<Element>& state) {
    const BlockRange range = state.range;
    release(smem.k_empty[ring.stage()]);
    if (range.begin == range.end - 1) release(smem.q_empty);
    ring.advance();
    float factor[2];
    exponentiate<false>(even_p, state, BlockKinds(state, Traits::kTileN), range.end - 1, factor, true);
  }

  // The blocks after the first.
  BROADHEAD_DEVICE void run_blocks(P& even_p, P& odd_p, const TileState<Element>& state) {
    const BlockRange range = state.range;
    const BlockKinds kinds(state, Traits::kTileN);
    int block = range.end - 2;
    // Blocks of this range that step<true> may do: the one above must be plain, too.
    const int plain_begin = max_int(range.begin + 1, kinds.plain_begin);
    const int plain_end = kinds.plain_end - 1;
    if constexpr (!Traits::kTwoP) {
      while (block >= range.begin) {
        if (block < plain_end) {
          for (; block >= plain_begin; --block) step<true>(even_p, even_p, state, kinds, block, false);
        }
        step<false>(even_p, even_p, state, kinds, block, block == range.begin);
        --block;
      }
      last_pv(even_p, state, kinds, range.begin);
    } else {
      for (; block > range.begin; block -= 2) {
        if (block < plain_end && block > plain_begin) {
          step<true>(even_p, odd_p, state, kinds, block, false);
          step<true>(odd_p, even_p, state, kinds, block - 1, false);
        } else {
          step<false>(even_p, odd_p, state, kinds, block, false);
          step<false>(odd_p, even_p, state, kinds, block - 1, block - 1 == range.begin);
        }
      }
      if (block == range.begin) step<false>(even_p, odd_p, state, kinds, block, true);
      if (block == range.begin) {
        last_pv(odd_p, state, kinds, range.begin);
      } else {
        last_pv(even_p, state, kinds, range.begin);
      }
    }
  }

  // All tiles. The first S of a tile is in flight while the output of the one before is written.
  BROADHEAD_DEVICE void run() {
    // The first warpgroup has the first turn.
    if (Traits::kTurns && warpgroup == Traits::kConsumers - 1) named_barrier_arrive(kTurnBarrier, 256);
    P even_p, odd_p;  // of every other block: one is read by wgmma while the other is computed
    SlotState slot;
    RowPlace rows[2];     // of the tile before
    bool writes = false;  // there is one
    while (true) {
      barrier_wait(smem.tile_full[slot.stage()], slot.parity());
      const auto& tile = smem.tiles[slot.stage()];
      const bool valid = tile.valid;
      const bool has_keys = valid && tile.state.range.begin < tile.state.range.end;
      if (has_keys) {
        wait_first();
        wait_turn();
        Base::issue_qk(ring.stage());
        pass_turn();
        if (writes) write_tile(slot, rows);
        wgmma_wait<0>();
        fence_registers(s[0]);
        softmax = Softmax();
        first_block(even_p, tile.state);
      } else {
        if (writes) write_tile(slot, rows);
        softmax = Softmax();
      }
      if (!valid) break;
      clear_registers(o);
      if (has_keys) run_blocks(even_p, odd_p, tile.state);
      finish_tile(tile.state, tile.split, rows);
      slot.forget();
      slot.advance();
      writes = true;
    }
  }

  // Normalises O and writes the LSE. (ptxas lets wgmma be in flight while O is written only when O did not come
  // straight from wgmma.)
  BROADHEAD_DEVICE void finish_tile(const TileState<Element>& state, int split, RowPlace (&rows)[2]) {
    const int thread = fresh_thread();
    place_rows(rows, state.output, (thread / 32 - 4) * 16 + thread % 32 / 4);
    softmax.reduce_sum();
    float inverse[2];
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const RowResult result =
          finish_row<Element>(args.params, rows[i], {softmax.row_max[i], softmax.row_sum[i]}, state.scale, split);
      inverse[i] = result.inverse;
      if (thread % 4 == 0) write_lse(args.params, state.seqlen, rows[i], result.lse, split);
    }
    drop_empty(rows, inverse, split);
    scale_rows(o, inverse[0], inverse[1]);
  }

  // The output of the tile before `slot`.
  BROADHEAD_DEVICE void write_tile(const SlotState& slot, const RowPlace (&rows)[2]) {
    const auto& tile = smem.tiles[slot.stage(1)];
    write_rows<Element>(args.params, tile.state.seqlen, rows, o, 0, tile.split);
    __syncwarp();
    release(smem.tile_empty[slot.stage(1)]);
  }
};

}  // namespace broadhead::sm90
