// A consumer warpgroup of the forward kernel: 64 query rows, S = Q K^T, softmax, O += P V.
//
// Overlapped: S of block j and O += P V of the block before are in flight together, the softmax of j runs beside the
// latter. Otherwise warpgroups take turns: one multiplies while the others do their softmax.
#pragma once

#include "sm90/consumer.h"
#include "sm90/softmax.h"

namespace broadhead::sm90 {

template <class Traits>
struct Consumer {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using QLayout = typename Traits::QLayout;
  using KLayout = typename Traits::KLayout;
  using VLayout = typename Traits::VLayout;
  static_assert(Traits::kStages == 2, "the position in the ring of V follows from that of K");

  const KernelArgs& args;
  Storage& smem;
  const int warpgroup;
  RingState<2> ring;  // of K; V is used one block later
  std::uint32_t q_parity = 0;
  float s[1][Traits::kKeyTiles][4];
  using Probabilities = std::uint32_t[Traits::kKeyTiles / 2][4];  // A operand of P V
  float o[Traits::kOTiles][4];
  LazySoftmax softmax;

  BROADHEAD_DEVICE Consumer(const KernelArgs& args_, Storage& smem_)
      : args(args_),
        smem(smem_),
        // Uniform in a warp, and the compiler should know it.
        warpgroup(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1) {}

  // The warp's first row in the tile.
  BROADHEAD_DEVICE static int warp_row() { return (static_cast<int>(threadIdx.x) / 32 - 4) * 16; }

  BROADHEAD_DEVICE static bool leader() { return threadIdx.x % 32 == 0; }

  BROADHEAD_DEVICE void wait_turn() {
    if constexpr (Traits::kTurns) named_barrier_sync(kTurnBarrier + warpgroup, 256);
  }
  BROADHEAD_DEVICE void pass_turn() {
    if constexpr (Traits::kTurns) named_barrier_arrive(kTurnBarrier + (warpgroup + 1) % Traits::kConsumers, 256);
  }

  BROADHEAD_DEVICE void wait_full(Barrier& barrier, std::uint32_t parity) {
    barrier_wait(barrier, parity);
    if (args.maps.gather) fence_async_shared();  // cp.async writes are ordinary ones
  }

  BROADHEAD_DEVICE void release(Barrier& barrier) {
    if (leader()) barrier_arrive(barrier);
  }

  BROADHEAD_DEVICE void issue_qk(std::uint32_t stage) {
    using Descriptor = MatrixDescriptor<QLayout::kRowBytes>;
    const std::uint64_t a =
        Descriptor::make(smem_address(smem.q) + warpgroup * 8 * QLayout::kAtomBytes, 0, QLayout::kAtomBytes);
    const std::uint64_t b = Descriptor::make(smem_address(smem.k[stage]), 0, KLayout::kSlabBytes);
    fence_registers(s[0]);
    wgmma_fence();
    BROADHEAD_UNROLL
    for (int step = 0; step < QLayout::kSteps; ++step) {
      wgmma_ss<Element, Traits::kTileN, Major::K>(
          s[0], a + (QLayout::step_offset(step, Traits::kTileM * QLayout::kRowBytes) >> 4),
          b + (KLayout::step_offset(step, KLayout::kAtomBytes) >> 4), step > 0);
    }
    wgmma_commit();
    fence_registers(s[0]);
  }

  BROADHEAD_DEVICE void issue_pv(Probabilities& p, std::uint32_t stage) {
    const std::uint64_t b = MatrixDescriptor<VLayout::kRowBytes>::make(smem_address(smem.v[stage]), VLayout::kAtomBytes,
                                                                       VLayout::kSlabBytes);
    fence_registers(o);
    fence_registers(p);
    wgmma_fence();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kTileN / 16; ++step) {
      wgmma_rs<Element, Traits::kHeadDimV, Major::MN>(o, p[step], b + (step * 2 * VLayout::kSlabBytes >> 4), true);
    }
    wgmma_commit();
    fence_registers(o);
  }

  // `back`: blocks whose S was computed since.
  BROADHEAD_DEVICE void wait_v(const TileState<Element>& state, const BlockKinds& kinds, int block, int back) {
    const std::uint32_t stage = ring.stage(back);
    wait_full(smem.v_full[stage], ring.parity(back));
    if (!kinds.plain(block) && !all_live(state.source, block * Traits::kTileN, Traits::kTileN)) {
      clear_dead_rows<VLayout>(state.source, reinterpret_cast<char*>(smem.v[stage]), block * Traits::kTileN,
                               Traits::kTileN, warpgroup);
    }
  }

  // P of the block from S. True when O must be multiplied by `factor` before this block's P V is added.
  BROADHEAD_DEVICE bool exponentiate(Probabilities& p, const TileState<Element>& state, const BlockKinds& kinds,
                                     int block, float (&factor)[2], bool first) {
    if (!kinds.plain(block)) finish_scores(s, state, block * Traits::kTileN, warp_row());
    return softmax.template compute_p<Element>(p, s, kinds.scale_log2, factor, first);
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    softmax = LazySoftmax();
    BROADHEAD_UNROLL
    for (int t = 0; t < Traits::kOTiles; ++t) o[t][0] = o[t][1] = o[t][2] = o[t][3] = 0.f;
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    if constexpr (Traits::kOverlap) {
      run_overlapped(state, range);
    } else {
      run_in_turns(state, range);
    }
  }

  // S of `block` and O += P V of the block before it, whose P is `p`; leaves P of `block` in `next_p`.
  BROADHEAD_DEVICE void overlapped_step(Probabilities& p, Probabilities& next_p, const TileState<Element>& state,
                                        const BlockKinds& kinds, int block) {
    wait_full(smem.k_full[ring.stage()], ring.parity());
    wait_turn();
    issue_qk(ring.stage());
    wait_v(state, kinds, block + 1, 1);
    issue_pv(p, ring.stage(1));
    pass_turn();
    wgmma_wait<1>();
    fence_registers(s[0]);
    release(smem.k_empty[ring.stage()]);
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
      softmax.template exponentiate<0, Traits::kKeyTiles>(s, kinds.scale_log2, [](float x) { return exp2_approx(x); });
      fence_registers(s[0]);
    }
    // In either branch, or ptxas would move the wait ahead of the exponentials.
    if (raised) {
      wgmma_wait_again();
      fence_registers(o);
      scale_rows(o, factor[0], factor[1]);
    } else {
      wgmma_wait<0>();
      fence_registers(o);
    }
    fence_registers(p);
    release(smem.v_empty[ring.stage(2)]);
    if constexpr (!Traits::kTwoP) pack_p(next_p);
  }

  BROADHEAD_DEVICE void pack_p(Probabilities& p) const {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      p[n / 2][n % 2 * 2] = pack_pair<Element>(s[0][n][0], s[0][n][1]);
      p[n / 2][n % 2 * 2 + 1] = pack_pair<Element>(s[0][n][2], s[0][n][3]);
    }
  }

  BROADHEAD_DEVICE void last_pv(Probabilities& p, const TileState<Element>& state, const BlockKinds& kinds, int block) {
    wait_v(state, kinds, block, 1);
    issue_pv(p, ring.stage(1));
    wgmma_wait<0>();
    fence_registers(o);
    release(smem.v_empty[ring.stage(1)]);
  }

  BROADHEAD_DEVICE void run_overlapped(const TileState<Element>& state, BlockRange range) {
    const BlockKinds kinds(state, Traits::kTileN);
    Probabilities even_p, odd_p;  // of every other block: one is read by wgmma while the other is computed
    float factor[2];
    int block = range.end - 1;
    wait_full(smem.k_full[ring.stage()], ring.parity());
    wait_turn();
    issue_qk(ring.stage());
    pass_turn();
    wgmma_wait<0>();
    fence_registers(s[0]);
    release(smem.k_empty[ring.stage()]);
    ring.advance();
    exponentiate(even_p, state, kinds, block, factor, true);
    if constexpr (!Traits::kTwoP) {
      for (block -= 1; block >= range.begin; --block) overlapped_step(even_p, even_p, state, kinds, block);
      release(smem.q_empty);
      last_pv(even_p, state, kinds, range.begin);
    } else {
      for (block -= 1; block > range.begin; block -= 2) {
        overlapped_step(even_p, odd_p, state, kinds, block);
        overlapped_step(odd_p, even_p, state, kinds, block - 1);
      }
      if (block == range.begin) overlapped_step(even_p, odd_p, state, kinds, block);
      release(smem.q_empty);
      if (block == range.begin) {
        last_pv(odd_p, state, kinds, range.begin);
      } else {
        last_pv(even_p, state, kinds, range.begin);
      }
    }
  }

  BROADHEAD_DEVICE void run_in_turns(const TileState<Element>& state, BlockRange range) {
    const BlockKinds kinds(state, Traits::kTileN);
    wait_full(smem.k_full[ring.stage()], ring.parity());
    wait_turn();
    Probabilities p;
    for (int block = range.end - 1;; --block) {
      issue_qk(ring.stage());
      pass_turn();
      wgmma_wait<0>();
      fence_registers(s[0]);
      release(smem.k_empty[ring.stage()]);
      ring.advance();
      float factor[2];
      if (exponentiate(p, state, kinds, block, factor, block == range.end - 1)) scale_rows(o, factor[0], factor[1]);
      fence_registers(p);  // or the compiler would move the exponentials into this warpgroup's turn
      wait_v(state, kinds, block, 1);
      const bool last = block == range.begin;
      if (!last) wait_full(smem.k_full[ring.stage()], ring.parity());
      wait_turn();
      issue_pv(p, ring.stage(1));
      if (last) break;
      wgmma_wait<0>();
      fence_registers(o);
      release(smem.v_empty[ring.stage(1)]);
    }
    pass_turn();
    release(smem.q_empty);
    wgmma_wait<0>();
    fence_registers(o);
    release(smem.v_empty[ring.stage(1)]);
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

  BROADHEAD_DEVICE void run() {
    // The first warpgroup has the first turn.
    if constexpr (Traits::kTurns) {
      if (warpgroup == Traits::kConsumers - 1) named_barrier_arrive(kTurnBarrier, 256);
    }
    SlotState slot;
    while (true) {
      barrier_wait(smem.tile_full[slot.stage()], slot.parity());
      const TileSlot<Element>& tile = smem.tiles[slot.stage()];
      if (!tile.valid) break;
      run_tile(tile.state);
      write_tile(tile.state, tile.split);
      slot.forget();
      __syncwarp();
      release(smem.tile_empty[slot.stage()]);
      slot.advance();
    }
  }
};

}  // namespace broadhead::sm90
