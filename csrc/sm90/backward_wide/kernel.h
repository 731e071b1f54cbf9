// The wide Hopper backward kernels: a tile of keys (dK and dV) or of queries (dQ) a cluster of two CTAs; see traits.h.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "sm90/backward_wide/load.h"
#include "sm90/backward_wide/mainloop_gradient.h"
#include "sm90/backward_wide/mainloop_scores.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
BROADHEAD_DEVICE void init_pair_barriers(typename Traits::SharedStorage& smem, std::uint32_t rank) {
  smem.rows_full.init(1);
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    for (auto& barrier : smem.chunk_full[stage]) barrier.init(1);
    for (auto& barrier : smem.chunk_empty[stage]) barrier.init(Traits::has_gradient(rank) ? 2 : 1);
    smem.prepared[stage].init(32);
    smem.stats_empty[stage].init(4);
  }
  for (int slot = 0; slot < 2; ++slot) {
    smem.received[slot].init(1);
    smem.sent_read[slot].init(Traits::readers_of_sent(rank));
  }
  cutlass::arch::fence_barrier_init();
  for (auto& barrier : smem.received) barrier.arrive_and_expect_tx(Traits::received_bytes(rank));
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) pair_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const std::uint32_t rank = cute::block_rank_in_cluster();
  if (threadIdx.x == 0) {
    init_pair_barriers<Traits>(smem, rank);
    if (rank == 0) {
      set_backward_work<Traits::kSide>(smem.work, args.params, blockIdx.x / Traits::kCluster, args.tiles,
                                       args.heads_per_section, Traits::kRows, Traits::kCols);
    }
  }
  __syncthreads();
  cute::cluster_sync();
  // CTA 0 alone reads the lengths: with others of its own, which another stream could have changed, CTA 1 would wait
  // for steps that CTA 0 does not have.
  if (threadIdx.x == 0 && rank == 1) {
    smem.work = *static_cast<const BackwardWork*>(__cluster_map_shared_rank(&smem.work, 0));
  }
  __syncthreads();
  const bool exists = smem.work.first_row < smem.work.end_row;

  // Each role ends by itself, or ptxas would not see what registers it has. No CTA leaves before the other: until
  // then that one may write into its shared memory.
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (exists && has_steps(smem.work)) {
      if (threadIdx.x == 0) {
        load_operand<Traits>(args, smem, rank);
      } else if (warp == 1) {
        prepare_steps<Traits>(args, smem, rank);
      }
    }
    __syncwarp();
    cute::cluster_sync();
  } else if (warp < 8) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kScoreRegisters>();
    if (exists && has_steps(smem.work)) PairScores<Traits>{args.params, smem}.run(rank);
    __syncwarp();
    cute::cluster_sync();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kGradientRegisters>();
    if (exists && Traits::has_gradient(rank)) PairGradient<Traits>{args.params, smem, rank, warp / 4 - 2}.run();
    __syncwarp();
    cute::cluster_sync();
  }
}

}  // namespace broadhead::sm90
