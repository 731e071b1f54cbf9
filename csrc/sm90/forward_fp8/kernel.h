// The Hopper forward kernel for e4m3 q, k and v: persistent CTAs, one to three an SM, a producer warpgroup and
// consumers.
//
// Producer warpgroup: warp 0 loads (TMA, or gathers), warps 1 and 2 transpose V, warp 3 takes tiles. Consumers: 64
// query rows each.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "common/dependent_launch.h"
#include "sm90/forward_fp8/load.h"
#include "sm90/forward_fp8/mainloop.h"
#include "sm90/forward_fp8/traits.h"
#include "sm90/forward_fp8/transpose.h"
#include "sm90/load.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    fp8_kernel(const __grid_constant__ KernelArgs args) {
  assume_call<Traits>(args);
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    const int fills = args.maps.gather ? 32 * Traits::kGatherPieces : 1;
    for (int i = 0; i < kTileSlots; ++i) {
      smem.tile_full[i].init(1);
      smem.tile_empty[i].init(Traits::kConsumerWarps + 1 + Traits::kTransposeWarps);
    }
    smem.next_wanted.init(1);
    smem.q_full.init(1);
    smem.q_empty.init(Traits::kConsumerWarps);
    for (int i = 0; i < Traits::kStages; ++i) {
      smem.k_full[i].init(fills);
      smem.k_empty[i].init(Traits::kConsumerWarps);
      smem.v_full[i].init(fills);
      smem.v_empty[i].init(Traits::kTransposeWarps);
      smem.transposed_full[i].init(Traits::kTransposeWarps);
      smem.transposed_empty[i].init(Traits::kConsumerWarps);
      smem.missing[i].clear();
    }
    cutlass::arch::fence_barrier_init();
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
    } else if (warp > 0) {
      transpose_tiles<Traits>(args, smem, warp - 1);
    } else if (args.maps.gather) {
      gather_fp8_tiles<Traits>(args, smem);
    } else {
      load_tiles<Traits>(args, smem, true, true);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Fp8Consumer<Traits> consumer(args, smem);
    consume_tiles(consumer);
  }
}

}  // namespace broadhead::sm90
