// A consumer warpgroup of the forward kernel: 64 query rows, S = Q K^T, softmax, O += P V.
//
// S of n_block j and O += P V of the n_block before are in flight together, the softmax of j runs beside the latter.
#pragma once

#include "common/accumulator.h"
#include "sm90/consumer_base.h"
#include "sm90/epilogue.h"
#include "sm90/softmax.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct Consumer final : ConsumerBase<Traits> {
  using Base = ConsumerBase<Traits>;
  using typename Base::Element;
  using VLayout = typename Traits::VLayout;
  using Base::args, Base::leader, Base::ping_pong_pass, Base::q_parity, Base::release, Base::ring, Base::s, Base::smem;
  using Base::wait_full, Base::ping_pong_wait, Base::warp_row, Base::warpgroup;
  using Softmax = LazySoftmax;
  using Slot = TileSlot<Element>;
  using P = Probabilities<Element, Traits::kKeyTiles>;  // A operand of P V

  float o[Traits::kOTiles][4];
  Softmax softmax;

  using Base::Base;

  BROADHEAD_DEVICE void issue_pv(P& p, std::uint32_t stage) {
    fence_registers(o);
    fence_registers(p);
    const std::uint64_t b = MatrixDescriptor<VLayout::kRowBytes>::make(smem_address(smem.v[stage]),
                                                                       VLayout::kSubtileStride, VLayout::kSlabStride);
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kTileN / 16; ++step) {
      BROADHEAD_UNROLL
      for (int part = 0; part < Traits::kOParts; ++part) {
        constexpr int kTiles = Traits::kOTiles / Traits::kOParts;
        auto& columns = reinterpret_cast<float (&)[kTiles][4]>(o[part * kTiles]);
        constexpr int kPartBytes = kTiles * 8 / VLayout::kSubtileCols * VLayout::kSubtileStride;
        wgmma_rs<Element, 8 * kTiles, Major::MN>(columns, p[step],
                                                 b + (step * 2 * VLayout::kSlabStride + part * kPartBytes >> 4), true);
      }
    }
    cute::warpgroup_commit_batch();
    fence_registers(o);
  }

  // Waits for V of the n_block before the one whose K is next.
  BROADHEAD_DEVICE void wait_v() { wait_full(smem.v_full[ring.stage(1)], ring.parity(1)); }

  // Clears what no query sees of that V, together with the other warpgroups. It must not stand between ping_pong_wait
  // and ping_pong_pass, for which the others may wait.
  BROADHEAD_DEVICE void prepare_v(const TileState<Element>& state, int block) {
    const int key0 = first_key_of<Traits>(state, block);
    if (all_live<Traits>(state.source.live, key0, Traits::kTileN)) return;
    wait_v();
    const ClearShare share{fresh_thread() / 32 - 4, Traits::kConsumerWarps, 0, VLayout::kBytes / 16};
    clear_dead_rows<VLayout, Traits::kPlainCall>(state.source, reinterpret_cast<char*>(smem.v[ring.stage(1)]), key0,
                                                 Traits::kTileN, share);
    cutlass::arch::fence_view_async_shared();
    NamedBarrier::sync(32 * Traits::kConsumerWarps, hardware_id(kClearBarrier));
  }

  BROADHEAD_DEVICE void mask_scores(const Slot& tile, int block) {
    finish_scores<Traits>(s, tile.state, first_key_of<Traits>(tile.state, block), warp_row());
  }

  // Computes P of the n_block from S. True when O must be multiplied by `factor` before this n_block's P V is added.
  template <bool kPlain>
  BROADHEAD_DEVICE bool exponentiate(P& p, const Slot& tile, const BlockKinds& kinds, int block, float (&factor)[2],
                                     bool first) {
    if (!kPlain && !kinds.plain(block)) mask_scores(tile, block);
    return softmax.template compute_p<Element>(p, s, kinds.scale_log2, factor, first);
  }

  // Waits for Q, and for K of a tile's first n_block.
  BROADHEAD_DEVICE void wait_first() {
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    wait_full(smem.k_full[ring.stage()], ring.parity());
  }

  // S of `block` and O += P V of the n_block before it, whose P is `p`; leaves P of `block` in `next_p`. `last`: of the
  // tile. kPlain: neither of the two needs a mask, and it is not the last; the code of most n_blocks stays in one
  // piece.
  template <bool kPlain>
  BROADHEAD_DEVICE void step(P& p, P& next_p, const Slot& tile, const BlockKinds& kinds, int block, bool last) {
    if (!kPlain && !kinds.plain(block + 1)) prepare_v(tile.state, block + 1);
    wait_full(smem.k_full[ring.stage()], ring.parity());
    const bool some_missing = Base::some_missing(ring.stage());
    ping_pong_wait();
    Base::issue_qk(ring.stage());
    wait_v();
    issue_pv(p, ring.stage(1));
    ping_pong_pass();
    cute::warpgroup_wait<1>();
    fence_registers(s[0]);
    if (some_missing) Base::hide_missing_keys(ring.stage());
    release(smem.k_empty[ring.stage()]);
    if (!kPlain && last) release(smem.q_empty);
    ring.advance();
    float factor[2];
    bool raised;
    if constexpr (Traits::kTwoP) {
      raised = exponentiate<kPlain>(next_p, tile, kinds, block, factor, false);
    } else {
      if (!kPlain && !kinds.plain(block)) mask_scores(tile, block);
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
      if (computed) cute::warpgroup_wait<0>();
    } else {
      if (!computed) __trap();
      cute::warpgroup_wait<0>();
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

  BROADHEAD_DEVICE void last_pv(P& p, const Slot& tile, const BlockKinds& kinds, int block) {
    if (!kinds.plain(block)) prepare_v(tile.state, block);
    wait_v();
    issue_pv(p, ring.stage(1));
    cute::warpgroup_wait<0>();
    fence_registers(o);
    release(smem.v_empty[ring.stage(1)]);
  }

  // The first n_block, whose S is ready; P comes into even_p.
  BROADHEAD_DEVICE void first_block(P& even_p, const Slot& tile) {
    const BlockRange range = tile.state.range;
    if (Base::some_missing(ring.stage())) Base::hide_missing_keys(ring.stage());
    release(smem.k_empty[ring.stage()]);
    if (range.begin == range.end - 1) release(smem.q_empty);
    ring.advance();
    float factor[2];
    const BlockKinds kinds(tile.state, Traits::kTileN, Traits::kPlainCall);
    exponentiate<false>(even_p, tile, kinds, range.end - 1, factor, true);
  }

  // The n_blocks after the first.
  BROADHEAD_DEVICE void run_blocks(P& even_p, P& odd_p, const Slot& tile) {
    const BlockRange range = tile.state.range;
    const BlockKinds kinds(tile.state, Traits::kTileN, Traits::kPlainCall);
    int block = range.end - 2;
    // n_blocks of this range that step<true> may do: the one above must be plain, too.
    const int plain_begin = max_int(range.begin + 1, kinds.plain_begin);
    const int plain_end = kinds.plain_end - 1;
    if constexpr (!Traits::kTwoP) {
      while (block >= range.begin) {
        if (block < plain_end) {
          for (; block >= plain_begin; --block) step<true>(even_p, even_p, tile, kinds, block, false);
        }
        step<false>(even_p, even_p, tile, kinds, block, block == range.begin);
        --block;
      }
      last_pv(even_p, tile, kinds, range.begin);
    } else {
      for (; block > range.begin; block -= 2) {
        if (block < plain_end && block > plain_begin) {
          step<true>(even_p, odd_p, tile, kinds, block, false);
          step<true>(odd_p, even_p, tile, kinds, block - 1, false);
        } else {
          step<false>(even_p, odd_p, tile, kinds, block, false);
          step<false>(odd_p, even_p, tile, kinds, block - 1, block - 1 == range.begin);
        }
      }
      if (block == range.begin) step<false>(even_p, odd_p, tile, kinds, block, true);
      if (block == range.begin) {
        last_pv(odd_p, tile, kinds, range.begin);
      } else {
        last_pv(even_p, tile, kinds, range.begin);
      }
    }
  }

  // Begins the tile of `slot`, up to P of the first n_block, and writes the output of the one before (`lse`),
  // if any, while the first S is in flight. False: there is no tile.
  BROADHEAD_DEVICE bool start_tile(P& even_p, const SlotState& slot, const float (&lse)[2]) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const Slot& tile = smem.tiles[slot.stage()];
    const bool has_keys = tile.valid && tile.state.range.begin < tile.state.range.end;
    if (has_keys) {
      wait_first();
      ping_pong_wait();
      Base::issue_qk(ring.stage());
      ping_pong_pass();
      if (slot.advanced()) write_tile(slot, lse);
      cute::warpgroup_wait<0>();
      fence_registers(s[0]);
      softmax = Softmax();
      first_block(even_p, smem.tiles[slot.stage()]);
    } else {
      if (slot.advanced()) write_tile(slot, lse);
      softmax = Softmax();
    }
    return smem.tiles[slot.stage()].valid;
  }

  BROADHEAD_DEVICE void run() {
    Base::ping_pong_start();
    P even_p, odd_p;  // one is read by wgmma while the other, of the next n_block, is computed
    SlotState slot;
    float lse[2];  // the LSE of the previous tile
    while (start_tile(even_p, slot, lse)) {
      slot.forget();
      const Slot& tile = smem.tiles[slot.stage()];
      clear_accumulators(o);
      if (tile.state.range.begin < tile.state.range.end) run_blocks(even_p, odd_p, tile);
      finish_tile(tile, lse);
      slot.forget();
      ring.forget();
      slot.advance();
    }
  }

  BROADHEAD_DEVICE void find_rows(RowPlace (&rows)[2], const Slot& tile) const {
    const int thread = fresh_thread();
    place_rows(rows, tile.state.output, (thread / 32 - 4) * 16 + thread % 32 / 4);
  }

  // Normalises O. (ptxas lets wgmma be in flight while O is written only when O did not come straight from wgmma.)
  BROADHEAD_DEVICE void finish_tile(const Slot& tile, float (&lse)[2]) {
    RowPlace rows[2];
    find_rows(rows, tile);
    softmax.reduce_sum();
    float inverse[2];
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const RowResult result = finish_row<Element>(args.params, rows[i], {softmax.row_max[i], softmax.row_sum[i]},
                                                   tile.state.scale, split_of<Traits>(tile));
      inverse[i] = result.inverse;
      lse[i] = result.lse;
    }
    scale_rows(o, inverse[0], inverse[1]);
  }

  // Writes the output of the tile before `slot`.
  BROADHEAD_DEVICE void write_tile(const SlotState& slot, const float (&lse)[2]) {
    const Slot& tile = smem.tiles[slot.stage(1)];
    RowPlace rows[2];
    find_rows(rows, tile);
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (fresh_thread() % 4 == 0) write_lse(args.params, tile.state.seqlen, rows[i], lse[i], split_of<Traits>(tile));
    }
    drop_empty(rows, lse[0] == -INFINITY, lse[1] == -INFINITY, split_of<Traits>(tile));
    write_rows<Element>(args.params, tile.state.seqlen, rows, o, 0, split_of<Traits>(tile));
    __syncwarp();
    release(smem.tile_empty[slot.stage(1)]);
  }
};

}  // namespace broadhead::sm90
