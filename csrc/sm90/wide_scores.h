// The score warpgroup of the wide kernel: S = Q K^T, softmax, P and row factors into shared memory.
//
// P of a block is handed over only once S of the next block is complete: O += P V then fills the tensor cores during
// this warpgroup's softmax instead of slowing its wgmma down.
#pragma once

#include "sm90/consumer.h"
#include "sm90/softmax.h"
#include "sm90/wide_traits.h"

namespace broadhead::sm90 {

// Frees, in both blocks of the cluster, a stage that wgmma has read. It is an instruction of the whole warpgroup, so one
// warp's wait tells of all four; the first warp frees it in the first block, the second in the other. `share`: of the
// stage's kReleases, for the warpgroup.
BROADHEAD_DEVICE void release_stage(Barrier& barrier, int warp, int share) {
  if (threadIdx.x % 32 == 0 && warp < 2) barrier_arrive_cluster(barrier, warp, share);
}

template <int kStages>
BROADHEAD_DEVICE void skip_stages(RingState<kStages>& ring, int count) {
  for (int i = 0; i < count; ++i) ring.advance();
}

template <class Traits>
struct ScoreWarpgroup {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using QLayout = typename Traits::QLayout;
  using KLayout = typename Traits::KLayout;
  using PLayout = typename Traits::PLayout;
  static constexpr int kQSubtileBytes = Traits::kTileM * QLayout::kRowBytes;

  const KernelArgs& args;
  Storage& smem;
  const int warp;      // in the warpgroup
  const int warp_row;
  RingState<Traits::kStages> ring;
  std::uint32_t q_parity = 0;
  SlotState p_slot;  // blocks so far
  SlotState inverse_slot;
  std::uint32_t q[Traits::kQRegisterCols / 16][4];
  float s[1][Traits::kKeyTiles][4];
  LazySoftmax softmax;

  BROADHEAD_DEVICE ScoreWarpgroup(const KernelArgs& args_, Storage& smem_)
      : args(args_),
        smem(smem_),
        warp(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) % 128 / 32, 0)),
        warp_row(warp * 16) {}

  BROADHEAD_DEVICE static bool leader() { return threadIdx.x % 32 == 0; }

  BROADHEAD_DEVICE void wait_stage() {
    barrier_wait(smem.full[ring.stage()], ring.parity());
    if (args.maps.gather) fence_async_shared();  // cp.async writes are ordinary ones
  }

  // Address of this lane's row of a 16 x 16 block at `step` of a tile of 64 rows; ldmatrix and stmatrix take four such.
  BROADHEAD_DEVICE std::uint32_t block_address(std::uint32_t base, int step) const {
    const int lane = threadIdx.x % 32;
    const int row = warp_row + lane % 16;
    const int unit = step % 4 * 2 + lane / 16;
    return base + step / 4 * kQSubtileBytes + row * 128 + ((unit ^ (row & 7)) * 16);
  }

  BROADHEAD_DEVICE void load_q_registers() {
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < Traits::kQRegisterChunks; ++chunk) {
      barrier_wait(smem.full[ring.stage()], ring.parity());
      const std::uint32_t base = smem_address(smem.ring[ring.stage()]);
      BROADHEAD_UNROLL
      for (int step = 0; step < KLayout::kSteps; ++step) {
        std::uint32_t (&a)[4] = q[chunk * KLayout::kSteps + step];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(block_address(base, step))
                     : "memory");
      }
      fence_async_shared();  // read by ordinary loads, next written by TMA
      __syncwarp();
      // Ordinary loads: each warp frees what it has read.
      if (leader()) {
        barrier_arrive_cluster(smem.empty[ring.stage()], 0, Traits::kReleases / 4);
        barrier_arrive_cluster(smem.empty[ring.stage()], 1, Traits::kReleases / 4);
      }
      ring.advance();
    }
  }

  BROADHEAD_DEVICE void compute_scores() {
    using Descriptor = MatrixDescriptor<128>;
    std::uint32_t previous = 0;
    fence_registers(s[0]);
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < Traits::kKChunks; ++chunk) {
      wait_stage();
      const std::uint64_t b = Descriptor::make(smem_address(smem.ring[ring.stage()]), 0, KLayout::kSlabBytes);
      const std::uint64_t a = Descriptor::make(
          smem_address(smem.q) + (chunk - Traits::kQRegisterChunks) * (KLayout::kSubtiles * kQSubtileBytes), 0,
          QLayout::kAtomBytes);
      wgmma_fence();
      BROADHEAD_UNROLL
      for (int step = 0; step < KLayout::kSteps; ++step) {
        const std::uint64_t b_step = b + (KLayout::step_offset(step, KLayout::kAtomBytes) >> 4);
        if (chunk < Traits::kQRegisterChunks) {
          wgmma_rs<Element, Traits::kTileN, Major::K>(s[0], q[chunk * KLayout::kSteps + step], b_step,
                                                      chunk + step > 0);
        } else {
          wgmma_ss<Element, Traits::kTileN, Major::K>(s[0], a + (QLayout::step_offset(step, kQSubtileBytes) >> 4),
                                                      b_step, chunk + step > 0);
        }
      }
      wgmma_commit();
      if (chunk > 0) {
        wgmma_wait<1>();
        release_stage(smem.empty[previous], warp, Traits::kReleases);
      }
      previous = ring.stage();
      ring.advance();
    }
    wgmma_wait<0>();
    fence_registers(s[0]);
    release_stage(smem.empty[previous], warp, Traits::kReleases);
  }

  // Softmax of S; P and the factors of O into the next slot, which the O warpgroups are not told of yet.
  BROADHEAD_DEVICE void store_p(const TileState<Element>& state, const BlockKinds& kinds, int block, bool first) {
    if (!kinds.plain(block)) finish_scores(s, state, block * Traits::kTileN, warp_row);
    std::uint32_t p[Traits::kKeyTiles / 2][4];
    float factor[2];
    const bool raised = softmax.compute_p<Element>(p, s, kinds.scale_log2, factor, first);
    const std::uint32_t slot = p_slot.stage();
    barrier_wait(smem.p_empty[slot], p_slot.parity() ^ 1);
    const int lane = threadIdx.x % 32;
    typename Traits::Rescale& rescale = smem.rescale[slot];
    if (lane == 0) rescale.needed[warp] = raised && !first;
    if (raised && lane % 4 == 0) {
      rescale.factor[warp_row + lane / 4] = factor[0];
      rescale.factor[warp_row + lane / 4 + 8] = factor[1];
    }
    const std::uint32_t base = smem_address(smem.p[slot]);
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kTileN / 16; ++step) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%4], {%0, %1, %2, %3};" ::"r"(p[step][0]),
                   "r"(p[step][1]), "r"(p[step][2]), "r"(p[step][3]), "r"(block_address(base, step))
                   : "memory");
    }
    fence_async_shared();
    __syncwarp();
  }

  BROADHEAD_DEVICE void hand_over_p() {
    if (leader()) barrier_arrive(smem.p_full[p_slot.stage()]);
    p_slot.advance();
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    softmax = LazySoftmax();
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    const BlockKinds kinds(state, Traits::kTileN);
    load_q_registers();
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    compute_scores();
    store_p(state, kinds, range.end - 1, true);
    for (int block = range.end - 2; block >= range.begin; --block) {
      compute_scores();
      hand_over_p();
      store_p(state, kinds, block, false);
      skip_stages(ring, Traits::kVChunks);  // V of the block before
    }
    hand_over_p();
    if (leader()) barrier_arrive(smem.q_empty);
    skip_stages(ring, Traits::kVChunks);
  }

  BROADHEAD_DEVICE void finish_tile(const TileState<Element>& state, int split) {
    const int lane = threadIdx.x % 32;
    softmax.reduce_sum();
    barrier_wait(smem.inverse_empty[inverse_slot.stage()], inverse_slot.parity() ^ 1);
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + i * 8 + lane / 4;
      const RowPlace place = place_row(state.output, row);
      const RowResult result =
          finish_row<Element>(args.params, place, {softmax.row_max[i], softmax.row_sum[i]}, state.scale, split);
      if (lane % 4 == 0) {
        smem.inverse[inverse_slot.stage()][row] = result.inverse;
        write_lse(args.params, state.seqlen, place, result.lse, split);
      }
    }
    __syncwarp();
    if (leader()) barrier_arrive(smem.inverse_full[inverse_slot.stage()]);
    inverse_slot.advance();
  }

  BROADHEAD_DEVICE void run() {
    SlotState slot;
    while (true) {
      barrier_wait(smem.tile_full[slot.stage()], slot.parity());
      const TileSlot<Element>& tile = smem.tiles[slot.stage()];
      if (!tile.valid) break;
      run_tile(tile.state);
      finish_tile(tile.state, tile.split);
      __syncwarp();
      if (leader()) barrier_arrive(smem.tile_empty[slot.stage()]);
      slot.advance();
    }
  }
};

}  // namespace broadhead::sm90
