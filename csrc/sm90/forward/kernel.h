// The Hopper forward kernel for head_dim <= 256: persistent CTAs, one to three an SM, a producer warpgroup and
// consumers.
//
// Producer warpgroup: warp 0 loads Q and K and warp 1 V by TMA (warps 0 to 2 gather K and V where TMA can not), warp 3
// takes tiles. Consumers: 64 query rows each.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "common/dependent_launch.h"
#include "sm90/forward/load.h"
#include "sm90/forward/mainloop.h"
#include "sm90/forward/traits.h"
#include "sm90/load.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    forward_kernel(const __grid_constant__ KernelArgs args) {
  assume_call<Traits>(args);
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    launch_dependents();  // the combine may take its place; it waits for the end of this grid
    const int loaders = args.maps.gather ? Traits::kLoaderWarps : 2;
    const int fills = args.maps.gather ? Traits::kLoaderWarps * 32 : 1;
    for (int i = 0; i < kTileSlots; ++i) {
      smem.tile_full[i].init(1);
      smem.tile_empty[i].init(Traits::kConsumerWarps + loaders);
    }
    smem.next_wanted.init(1);
    smem.q_full.init(1);
    smem.q_empty.init(Traits::kConsumerWarps);
    for (int i = 0; i < Traits::kStages; ++i) {
      smem.k_full[i].init(fills);
      smem.k_empty[i].init(Traits::kConsumerWarps);
      smem.v_full[i].init(fills);
      smem.v_empty[i].init(Traits::kConsumerWarps);
      smem.missing[i].clear();
    }
    cutlass::arch::fence_barrier_init();
    wait_for_predecessor();  // nothing before reads or writes global memory
  }
  TilePoster<Traits, typename Traits::SharedStorage, KernelArgs> poster(args, smem);
  if (Traits::kFirstTileEarly && warp == Traits::kSchedulerWarp) {
    wait_for_predecessor();
    poster.make_first();
  }
  __syncthreads();

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == Traits::kSchedulerWarp) {
      poster.run(Traits::kFirstTileEarly);
    } else if (args.maps.gather) {
      gather_tiles<Traits>(args, smem, warp);
    } else if (warp < 2) {
      load_tiles<Traits>(args, smem, warp == 0, warp == 1);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, smem).run();
  }
}

}  // namespace broadhead::sm90
