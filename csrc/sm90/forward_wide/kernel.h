// The Hopper forward kernel for 256 < head_dim <= 512 and for absorbed MLA: persistent clusters of two CTAs, or single
// CTAs; see traits.h.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "common/dependent_launch.h"
#include "sm90/forward_wide/load.h"
#include "sm90/forward_wide/mainloop_output.h"
#include "sm90/forward_wide/mainloop_scores.h"
#include "sm90/forward_wide/traits.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) wide_kernel(const __grid_constant__ KernelArgs args) {
  assume_call<Traits>(args);
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    launch_dependents();  // the combine may take its place; it waits for the end of this grid
    const int loaders = args.maps.gather ? Traits::kLoaderWarps : 2;
    for (int i = 0; i < kTileSlots; ++i) {
      smem.tile_full[i].init(1);
      smem.tile_empty[i].init(12 + loaders);
      smem.mailbox.full[i].init(1);
      smem.mailbox.empty[i].init(max_int(1, Traits::kCluster - 1));
      smem.p_full[i].init(4);
      smem.p_empty[i].init(8);
      smem.inverse_full[i].init(4);
      smem.inverse_empty[i].init(8);
    }
    smem.next_wanted.init(1);
    smem.q_full.init(Traits::kWithQv ? 2 : 1);
    smem.q_empty.init(4);
    const int arrivals = args.maps.gather ? Traits::kLoaderWarps * 32 : 1;
    if constexpr (Traits::kWithQv) {
      smem.k_full.init(arrivals);
      smem.k_empty.init(Traits::kReleases * Traits::kCluster);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      smem.full[i].init(arrivals);
      smem.empty[i].init(Traits::kReleases * Traits::kCluster);
      smem.missing[i].clear();
    }
    cutlass::arch::fence_barrier_init();
    wait_for_predecessor();  // nothing before reads or writes global memory
  }
  __syncthreads();
  cute::cluster_sync();

  // Each role ends by itself, or ptxas would not see what registers it has. No CTA leaves before the other: until
  // then that one may write into its shared memory.
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == Traits::kSchedulerWarp) {
      TilePoster<Traits, typename Traits::SharedStorage, KernelArgs>(args, smem).run(false);
    } else if (args.maps.gather) {
      WideLoader<Traits>(args, smem).run_gathering(warp);
    } else if (warp < 2) {
      WideLoader<Traits>(args, smem).run(warp == 0);
    }
    __syncwarp();
    cute::cluster_sync();
  } else if (warp < 8) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kScoreRegisters>();
    ScoreWarpgroup<Traits>(args, smem).run();
    __syncwarp();
    cute::cluster_sync();
  } else if (Traits::kLeftParts == Traits::kRightParts || warp < 12) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kOutputRegisters>();
    OutputWarpgroup<Traits, Traits::kLeftParts>(args, smem, warp / 4 - 2).run();
    __syncwarp();
    cute::cluster_sync();
  } else if constexpr (Traits::kLeftParts != Traits::kRightParts) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kOutputRegisters>();
    OutputWarpgroup<Traits, Traits::kRightParts>(args, smem, 1).run();
    __syncwarp();
    cute::cluster_sync();
  }
}

}  // namespace broadhead::sm90
