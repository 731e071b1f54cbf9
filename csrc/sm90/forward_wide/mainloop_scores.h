// The score warpgroup of the wide kernel: S = Q K^T, softmax, P and row factors into shared memory.
//
// P of an n_block is handed over only once S of the next n_block is complete: O += P V then fills the tensor cores
// during this warpgroup's softmax instead of slowing its wgmma down.
#pragma once

#include "sm90/consumer.h"
#include "sm90/forward_wide/traits.h"
#include "sm90/softmax.h"
#include "sm90/stmatrix.h"
#include "sm90/wgmma.h"
#include "tma/kernel_args.h"

namespace broadhead::sm90 {

using namespace tma;

// Tells every CTA of the cluster. By one thread: were they told far apart, a CTA that fills a stage for itself
// alone (Q, gathered rows) could come round again before the other has seen the first.
template <int kCluster>
BROADHEAD_DEVICE void arrive_everywhere(Barrier& barrier, int count) {
  BROADHEAD_UNROLL
  for (int rank = 0; rank < kCluster; ++rank) barrier_arrive_cluster(barrier, rank, count);
}

// Frees, in all CTAs of the cluster, a stage that wgmma has read. It is an instruction of the whole warpgroup, so
// one warp's wait tells of all four. `share`: of the stage's kReleases, for the warpgroup.
template <class Traits>
BROADHEAD_DEVICE void release_stage(Barrier& barrier, int warp, int share) {
  if (threadIdx.x % 32 != 0 || warp != 0) return;
  arrive_everywhere<Traits::kCluster>(barrier, share);
}

// Address of this lane's row of a 16 x 16 matrix at column step `step` of 64 rows whose first 16 bytes lie at `base`,
// in subtiles of 64 columns; ldmatrix and stmatrix take four 8 x 8 ones.
BROADHEAD_DEVICE std::uint32_t matrix_address(std::uint32_t base, int warp_row, int step) {
  const int lane = threadIdx.x % 32;
  const int row = warp_row + lane % 16;
  const int unit = step % 4 * 2 + lane / 16;
  return base + step / 4 * (64 * 128) + row * 128 + ((unit ^ (row & 7)) * 16);
}

template <class Traits>
struct ScoreWarpgroup {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using QLayout = typename Traits::QLayout;
  using KLayout = typename Traits::KLayout;
  using ScoreLayout = typename Traits::ScoreLayout;
  static constexpr int kQSubtileBytes = Traits::kTileM * QLayout::kRowBytes;

  const KernelArgs& args;
  Storage& smem;
  const int warp;  // in the warpgroup
  const int warp_row;
  typename Traits::KRing ring;
  std::uint32_t q_parity = 0;
  std::uint32_t k_parity = 0;  // kWithQv
  SlotState p_slot;            // n_blocks so far
  SlotState inverse_slot;
  std::uint32_t q[Traits::kQRegisterChunks * ScoreLayout::kSteps][4];
  float s[1][Traits::kKeyTiles][4];
  LazySoftmax softmax;

  BROADHEAD_DEVICE ScoreWarpgroup(const KernelArgs& args_, Storage& smem_)
      : args(args_),
        smem(smem_),
        warp(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) % 128 / 32, 0)),
        warp_row(warp * 16) {}

  BROADHEAD_DEVICE static bool leader() { return threadIdx.x % 32 == 0; }

  BROADHEAD_DEVICE void wait_full(Barrier& barrier, std::uint32_t parity) {
    barrier_wait(barrier, parity);
    if (args.maps.gather) cutlass::arch::fence_view_async_shared();  // cp.async writes are ordinary ones
  }

  BROADHEAD_DEVICE void load_q_registers() {
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < Traits::kQRegisterChunks; ++chunk) {
      barrier_wait(smem.full[ring.stage()], ring.parity());
      const std::uint32_t base = smem_address(smem.ring[ring.stage()]);
      BROADHEAD_UNROLL
      for (int step = 0; step < ScoreLayout::kSteps; ++step) {
        ldmatrix_x4(q[chunk * ScoreLayout::kSteps + step], matrix_address(base, warp_row, step));
      }
      cutlass::arch::fence_view_async_shared();  // read by ordinary loads, next written by TMA
      __syncwarp();
      // Ordinary loads: each warp frees what it has read.
      if (leader()) arrive_everywhere<Traits::kCluster>(smem.empty[ring.stage()], Traits::kReleases / 4);
      ring.advance();
    }
  }

  // Descriptor of the columns of Q in shared memory from `subtile` on.
  BROADHEAD_DEVICE std::uint64_t shared_q(int subtile) const {
    std::uint32_t base = smem_address(smem.q);
    // Or ptxas keeps those of all steps from one n_block to the next: 40 registers.
    if (Traits::kWithQv) asm volatile("" : "+r"(base));
    return MatrixDescriptor<128>::make(base + subtile * kQSubtileBytes, 0, QLayout::kAtomBytes);
  }

  // Whether keys of the n_block do not exist. `stage` holds the n_block's first columns of K, which are there. The warp
  // keeps what is noted of these keys: the stage is filled again before S is finished.
  BROADHEAD_DEVICE bool keep_missing(std::uint32_t stage) {
    const auto& missing = smem.missing[stage];
    if (args.params.page_table == nullptr || !missing.any()) return false;
    const int lane = threadIdx.x % 32;
    if (lane < Traits::kTileN / 32) smem.kept_missing[warp][lane] = missing.keys[lane];
    __syncwarp();
    return true;
  }

  // S = q K^T. Returns what keep_missing does.
  BROADHEAD_DEVICE bool multiply_q() {
    wait_full(smem.k_full, k_parity);
    k_parity ^= 1;
    const bool some_missing = keep_missing(0);
    const std::uint64_t a = shared_q(0);
    const std::uint64_t b = MatrixDescriptor<128>::make(smem_address(smem.k), 0, KLayout::kSlabBytes);
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < KLayout::kSteps; ++step) {
      wgmma_ss<Element, Traits::kTileN, Major::K>(s[0], a + (QLayout::step_offset(step, kQSubtileBytes) >> 4),
                                                  b + (KLayout::step_offset(step, KLayout::kAtomBytes) >> 4), step > 0);
    }
    cute::warpgroup_commit_batch();
    return some_missing;
  }

  BROADHEAD_DEVICE void compute_scores() {
    std::uint32_t previous = 0;
    fence_registers(s[0]);
    bool some_missing = false;
    if constexpr (Traits::kWithQv) some_missing = multiply_q();
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < Traits::kScoreChunks; ++chunk) {
      wait_full(smem.full[ring.stage()], ring.parity());
      if (!Traits::kWithQv && chunk == 0) some_missing = keep_missing(ring.stage());
      const std::uint64_t b =
          MatrixDescriptor<128>::make(smem_address(smem.ring[ring.stage()]), 0, ScoreLayout::kSlabBytes);
      const int shared_chunk = chunk - Traits::kQRegisterChunks;  // negative: in registers
      const std::uint64_t a =
          shared_chunk < 0 ? 0 : shared_q(Traits::kQSharedSubtile + shared_chunk * ScoreLayout::kSubtiles);
      cute::warpgroup_arrive();
      BROADHEAD_UNROLL
      for (int step = 0; step < ScoreLayout::kSteps; ++step) {
        const std::uint64_t b_step = b + (ScoreLayout::step_offset(step, ScoreLayout::kAtomBytes) >> 4);
        const bool accumulate = Traits::kWithQv || chunk + step > 0;
        if (shared_chunk < 0) {
          wgmma_rs<Element, Traits::kTileN, Major::K>(s[0], q[chunk * ScoreLayout::kSteps + step], b_step, accumulate);
        } else {
          wgmma_ss<Element, Traits::kTileN, Major::K>(s[0], a + (QLayout::step_offset(step, kQSubtileBytes) >> 4),
                                                      b_step, accumulate);
        }
      }
      cute::warpgroup_commit_batch();
      if (chunk > 0) {
        cute::warpgroup_wait<1>();
        release_stage<Traits>(smem.empty[previous], warp, Traits::kScoreShare);
      } else if constexpr (Traits::kWithQv) {
        cute::warpgroup_wait<1>();
        release_stage<Traits>(smem.k_empty, warp, Traits::kReleases);
      }
      previous = ring.stage();
      ring.advance();
    }
    cute::warpgroup_wait<0>();
    fence_registers(s[0]);
    release_stage<Traits>(smem.empty[previous], warp, Traits::kScoreShare);
    if (some_missing) {
      const auto& keys = smem.kept_missing[warp];
      hide_missing(s, [&](int n) { return missing_pair(keys[n / 4], n); });
      __syncwarp();  // all lanes have read them
    }
  }

  // Softmax of S; P and the factors of O into the next slot, which the O warpgroups are not told of yet.
  BROADHEAD_DEVICE void store_p(const TileState<Element>& state, const BlockKinds& kinds, int block, bool first) {
    if (!kinds.plain(block)) finish_scores<Traits>(s, state, first_key_of<Traits>(state, block), warp_row);
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
      stmatrix_x4(matrix_address(base, warp_row, step), p[step]);
    }
  }

  BROADHEAD_DEVICE void hand_over_p() {
    // Ordinary writes, read by wgmma; complete by now, so that the fence costs nothing (13 % of this warpgroup's time
    // right behind them).
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (leader()) smem.p_full[p_slot.stage()].arrive();
    p_slot.advance();
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    softmax = LazySoftmax();
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    const BlockKinds kinds(state, Traits::kTileN, Traits::kPlainCall);
    load_q_registers();
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    compute_scores();
    store_p(state, kinds, range.end - 1, true);
    for (int block = range.end - 2; block >= range.begin; --block) {
      compute_scores();
      hand_over_p();
      store_p(state, kinds, block, false);
    }
    hand_over_p();
    if (leader()) smem.q_empty.arrive();
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
    if (leader()) smem.inverse_full[inverse_slot.stage()].arrive();
    inverse_slot.advance();
  }

  BROADHEAD_DEVICE void run() {
    SlotState slot;
    while (true) {
      barrier_wait(smem.tile_full[slot.stage()], slot.parity());
      const TileSlot<Element>& tile = smem.tiles[slot.stage()];
      if (!tile.valid) break;
      run_tile(tile.state);
      finish_tile(tile.state, split_of<Traits>(tile));
      __syncwarp();
      if (leader()) smem.tile_empty[slot.stage()].arrive();
      slot.advance();
    }
  }
};

}  // namespace broadhead::sm90
