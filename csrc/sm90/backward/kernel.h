// The Hopper backward kernels: one tile of keys (dK and dV) or of queries (dQ) a CTA; a producer warpgroup and two
// consumers.
//
// Producer warpgroup: warp 0 loads tiles by TMA, warp 1 brings LSE and D of the queries that stream by; warps 2 and 3
// prepare keys, and in a fused kernel add dQ to the sums in global memory. All other sums are made by one CTA in one
// order, so that results are the same in every run.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "common/dependent_launch.h"
#include "sm90/backward/load.h"
#include "sm90/backward/mainloop_fused.h"
#include "sm90/backward/mainloop_keys.h"
#include "sm90/backward/mainloop_queries.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
BROADHEAD_DEVICE void init_barriers(typename Traits::SharedStorage& smem) {
  for (auto& barrier : smem.rows_full) barrier.init(1);
  for (auto& barrier : smem.first_full) barrier.init(1);
  for (auto& barrier : smem.stats_full) barrier.init(32);
  smem.keys_ready.init(64);
  for (auto& barrier : smem.second_full) barrier.init(1);
  for (auto& barrier : smem.first_empty) barrier.init(Traits::kConsumerWarps);
  for (auto& barrier : smem.second_empty) barrier.init(Traits::kConsumerWarps);
  if constexpr (Traits::kFused) {
    for (auto& barrier : smem.ds_full) barrier.init(Traits::kConsumerWarps);
    for (auto& barrier : smem.ds_empty) barrier.init(Traits::kConsumerWarps);
    for (auto& barrier : smem.dq_full) barrier.init(4);
    for (auto& barrier : smem.dq_empty) barrier.init(1);
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  if constexpr (Traits::kKeys && !Traits::kFused) launch_dependents();  // the kernel of dQ: see launch_side
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    set_backward_work<Traits::kSide>(smem.work, args.params, blockIdx.x, args.tiles, args.heads_per_section,
                                     Traits::kRows, Traits::kCols);
    init_barriers<Traits>(smem);
  }
  __syncthreads();
  if (smem.work.first_row >= smem.work.end_row) {
    if constexpr (!Traits::kKeys) wait_for_predecessor();  // see below
    return;
  }

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) {
      load_tiles<Traits>(args, smem);
      if constexpr (!Traits::kKeys) wait_for_predecessor();  // what follows must see dK and dV, too
    } else if (Traits::kKeys && warp == 1) {
      load_stats<Traits>(args, smem);
    } else if (Traits::kKeys && warp >= 2) {
      prepare_keys<Traits>(smem);
      if constexpr (Traits::kFused) {
        if (threadIdx.x % 32 == 0) add_dq<Traits>(args, smem, warp - 2);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    if constexpr (Traits::kFused) {
      FusedConsumer<Traits>{{args.params, smem}}.run();
    } else if constexpr (Traits::kKeys) {
      KeyConsumer<Traits>{args.params, smem}.run();
    } else {
      QueryConsumer<Traits>{args.params, smem}.run();
    }
  }
}

}  // namespace broadhead::sm90
