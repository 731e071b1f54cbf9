// The Hopper forward kernel for e4m3 q, k and v: one persistent CTA an SM, a producer warpgroup and consumers.
//
// Producer warpgroup: warp 0 loads (TMA, or gathers), warps 1 and 2 transpose V, warp 3 takes tiles. Consumers: 64
// query rows each.
#pragma once

#include "sm90/forward_fp8/load.h"
#include "sm90/forward_fp8/mainloop.h"
#include "sm90/forward_fp8/traits.h"
#include "sm90/forward_fp8/transpose.h"
#include "sm90/load.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) fp8_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    const int fills = args.maps.gather ? 32 * Traits::kGatherPieces : 1;
    for (int i = 0; i < kTileSlots; ++i) {
      barrier_init(smem.tile_full[i], 1);
      barrier_init(smem.tile_empty[i], Traits::kConsumerWarps + 1 + Traits::kTransposeWarps);
    }
    barrier_init(smem.next_wanted, 1);
    barrier_init(smem.q_full, 1);
    barrier_init(smem.q_empty, Traits::kConsumerWarps);
    for (int i = 0; i < Traits::kStages; ++i) {
      barrier_init(smem.k_full[i], fills);
      barrier_init(smem.k_empty[i], Traits::kConsumerWarps);
      barrier_init(smem.v_full[i], fills);
      barrier_init(smem.v_empty[i], Traits::kTransposeWarps);
      barrier_init(smem.transposed_full[i], Traits::kTransposeWarps);
      barrier_init(smem.transposed_empty[i], Traits::kConsumerWarps);
      smem.missing[i].clear();
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp < 4) {
    give_registers<Traits::kProducerRegisters>();
    if (warp == Traits::kSchedulerWarp) {
      post_tiles<Traits>(args, smem);
    } else if (warp > 0) {
      transpose_tiles<Traits>(args, smem, warp - 1);
    } else if (args.maps.gather) {
      gather_fp8_tiles<Traits>(args, smem);
    } else {
      load_tiles<Traits>(args, smem, true, true);
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    Fp8Consumer<Traits> consumer(args, smem);
    consume_tiles(consumer);
  }
}

}  // namespace broadhead::sm90
