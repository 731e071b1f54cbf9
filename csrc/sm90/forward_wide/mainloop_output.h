// An output warpgroup of the wide kernel: O += P V for 64 rows and kParts parts of the columns, the left or the right
// ones.
#pragma once

#include "common/accumulator.h"
#include "sm90/consumer.h"
#include "sm90/epilogue.h"
#include "sm90/forward_wide/mainloop_scores.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits, int kParts>
struct OutputWarpgroup {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using VLayout = typename Traits::VLayout;
  using PLayout = typename Traits::PLayout;
  // Stages of an n_block: all, of each its columns, or its own ones.
  static constexpr int kChunks = Traits::kWithQv ? kParts : Traits::kVChunks;
  static constexpr int kPartBytes = Traits::kPartCols / VLayout::kSubtileCols * VLayout::kAtomBytes;
  static constexpr int kRightBytes = Traits::kWithQv ? 0 : Traits::kLeftParts * kPartBytes;  // where O right begins

  const KernelArgs& args;
  Storage& smem;
  const int half;  // 0: left columns
  const int warp;  // in the warpgroup
  const int warp_row;
  typename Traits::VRing ring;
  SlotState p_slot;
  SlotState inverse_slot;
  float o[kParts][Traits::kPartCols / 8][4];

  BROADHEAD_DEVICE OutputWarpgroup(const KernelArgs& args_, Storage& smem_, int half_)
      : args(args_),
        smem(smem_),
        half(half_),
        warp(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) % 128 / 32, 0)),
        warp_row(warp * 16) {}

  BROADHEAD_DEVICE static bool leader() { return threadIdx.x % 32 == 0; }

  BROADHEAD_DEVICE void fence_output() {
    BROADHEAD_UNROLL
    for (int part = 0; part < kParts; ++part) fence_registers(o[part]);
  }

  BROADHEAD_DEVICE void add_block(const TileState<Element>& state, const BlockKinds& kinds, int block) {
    const int lane = threadIdx.x % 32;
    const std::uint32_t slot = p_slot.stage();
    barrier_wait(smem.p_full[slot], p_slot.parity());
    const typename Traits::Rescale& rescale = smem.rescale[slot];
    if (rescale.needed[warp]) {
      const float upper = rescale.factor[warp_row + lane / 4], lower = rescale.factor[warp_row + lane / 4 + 8];
      BROADHEAD_UNROLL
      for (int part = 0; part < kParts; ++part) scale_rows(o[part], upper, lower);
    }
    const std::uint64_t a = MatrixDescriptor<128>::make(smem_address(smem.p[slot]), 0, PLayout::kAtomBytes);
    std::uint32_t previous = 0;
    fence_output();
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      barrier_wait(smem.full[ring.stage()], ring.parity());
      if (args.maps.gather) cutlass::arch::fence_view_async_shared();
      const int first = Traits::kWithQv ? 0 : chunk * Traits::kVKeys;  // key of the n_block
      const int key0 = first_key_of<Traits>(state, block) + first;
      if (!kinds.plain(block) && !all_live<Traits>(state.source.live, key0, Traits::kVKeys)) {
        // Each warpgroup its own columns.
        constexpr int kUnits = Traits::kPartCols * static_cast<int>(sizeof(Element)) / 16;  // of a part
        const ClearShare share = Traits::kWithQv
                                     ? ClearShare{warp, 4, 0, kUnits}
                                     : ClearShare{warp, 4, half * Traits::kLeftParts * kUnits, kParts * kUnits};
        clear_dead_rows<VLayout, Traits::kPlainCall>(state.source, smem.ring[ring.stage()], key0, Traits::kVKeys,
                                                     share);
        cutlass::arch::fence_view_async_shared();
        NamedBarrier::sync(128, hardware_id(kClearBarrier + half));
      }
      const std::uint64_t b = MatrixDescriptor<128>::make(smem_address(smem.ring[ring.stage()]) + half * kRightBytes,
                                                          VLayout::kAtomBytes, VLayout::kSlabBytes);
      cute::warpgroup_arrive();
      BROADHEAD_UNROLL
      for (int step = 0; step < Traits::kVKeys / 16; ++step) {
        BROADHEAD_UNROLL
        for (int part = 0; part < kParts; ++part) {
          if (Traits::kWithQv && part != chunk) continue;
          wgmma_ss<Element, Traits::kPartCols, Major::MN>(
              o[part], a + ((first * 2 + step * 32) >> 4),
              b + ((step * 2 * VLayout::kSlabBytes + (Traits::kWithQv ? 0 : part * kPartBytes)) >> 4), true);
        }
      }
      cute::warpgroup_commit_batch();
      if (chunk > 0) {
        cute::warpgroup_wait<1>();
        release_stage<Traits>(smem.empty[previous], warp, Traits::kReleases / 2);
      }
      previous = ring.stage();
      ring.advance();
    }
    cute::warpgroup_wait<0>();
    fence_output();
    release_stage<Traits>(smem.empty[previous], warp, Traits::kReleases / 2);
    if (leader()) smem.p_empty[slot].arrive();
    p_slot.advance();
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    clear_accumulators(o);
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    const BlockKinds kinds(state, Traits::kTileN, Traits::kPlainCall);
    if constexpr (Traits::kWithQv) {
      // The ring's order: Q, V of the first n_block (left, right), V of the second, ...
      ring.skip(Traits::kQRegisterChunks + half * kChunks);
      for (int block = range.end - 1; block >= range.begin; --block) {
        add_block(state, kinds, block);
        ring.skip(block > range.begin ? kChunks : (1 - half) * kChunks);
      }
    } else {
      for (int block = range.end - 1; block >= range.begin; --block) add_block(state, kinds, block);
    }
  }

  BROADHEAD_DEVICE void write_tile(const TileState<Element>& state, int split) {
    const int lane = threadIdx.x % 32;
    barrier_wait(smem.inverse_full[inverse_slot.stage()], inverse_slot.parity());
    const float* row_inverse = smem.inverse[inverse_slot.stage()];
    const float inverse[2] = {row_inverse[warp_row + lane / 4], row_inverse[warp_row + lane / 4 + 8]};
    __syncwarp();
    if (leader()) smem.inverse_empty[inverse_slot.stage()].arrive();
    inverse_slot.advance();
    RowPlace rows[2];
    place_rows(rows, state.output, warp_row + lane / 4);
    drop_empty(rows, inverse[0] == 0.f, inverse[1] == 0.f, split);
    BROADHEAD_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int col0 = half * (Traits::kLeftParts * Traits::kPartCols) + part * Traits::kPartCols;
      scale_rows(o[part], inverse[0], inverse[1]);
      write_rows<Element>(args.params, state.seqlen, rows, o[part], col0, split);
    }
  }

  BROADHEAD_DEVICE void run() {
    SlotState slot;
    while (true) {
      barrier_wait(smem.tile_full[slot.stage()], slot.parity());
      const TileSlot<Element>& tile = smem.tiles[slot.stage()];
      if (!tile.valid) break;
      run_tile(tile.state);
      write_tile(tile.state, tile.split);  // PERF: a constant, of a plain call, makes ptxas spill
      __syncwarp();
      if (leader()) smem.tile_empty[slot.stage()].arrive();
      slot.advance();
    }
  }
};

}  // namespace broadhead::sm90
