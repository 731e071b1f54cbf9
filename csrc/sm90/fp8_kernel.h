// The Hopper forward kernel for e4m3 q, k and v: one persistent block an SM, a producer warpgroup and consumers.
//
// Producer warpgroup: warp 0 loads (TMA, or gathers), warps 1 and 2 transpose V, warp 3 takes tiles. Consumers: 64
// query rows each.
#pragma once

#include "sm90/forward_load.h"
#include "sm90/fp8_consumer.h"
#include "sm90/fp8_transpose.h"

namespace broadhead::sm90 {

// One warp gathers everything: the others transpose. It has registers for the pages of half a block.
template <class Traits>
BROADHEAD_DEVICE void gather_fp8_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  constexpr int kKeys = Traits::kTileN / Traits::kGatherPieces;
  const AttnParams& params = args.params;
  const bool leader = threadIdx.x % 32 == 0;
  RingState<Traits::kStages> ring;
  std::uint32_t q_parity = 0;
  for_each_tile(smem, leader, [&](const TileState<Element>& state) {
    const KvSource<Element>& source = state.source;
    const BlockRange range = state.range;
    if (leader) want_next(smem.next_wanted, range, range.end);
    if (range.begin >= range.end) return;
    const QCoordinates q_at = q_coordinates(args.maps.q, state);
    if (leader) prefetch_q<typename Traits::QLayout>(args.maps.q, q_at);
    for (int block = range.end - 1; block >= range.begin; --block) {
      if (leader) want_next(smem.next_wanted, range, block);
      const std::uint32_t stage = ring.stage();
      barrier_wait(smem.k_empty[stage], ring.parity() ^ 1);
      barrier_wait(smem.v_empty[stage], ring.parity() ^ 1);
      if (block == range.end - 1) wait_and_load_q<Traits>(args, q_at, smem, leader, q_parity);
#pragma unroll 1
      for (int piece = 0; piece < Traits::kGatherPieces; ++piece) {
        using KLayout = typename Traits::KLayout;
        using VLayout = typename Traits::VLayout;
        GatheredRows<kKeys, 1> rows;
        rows.read(source, block * Traits::kTileN + piece * kKeys, params.page_size, 0);
        if (rows.changes(params, smem.missing[stage], piece)) {
          rows.note(params, smem.missing[stage], piece * (kKeys / 8), 0, piece);
        }
        gather_stage<KLayout>(params, rows, source.k, params.k_strides, 0, kKeys / 8, 0, params.head_dim,
                              smem_address(smem.k[stage]) + piece * (kKeys / 8 * KLayout::kSlabStride),
                              smem.k_full[stage], 0);
        gather_stage<VLayout>(params, rows, source.v, params.v_strides, 0, kKeys / 8, 0, params.head_dim_v,
                              smem_address(smem.v[stage]) + piece * (kKeys / 8 * VLayout::kSlabStride),
                              smem.v_full[stage], 0);
      }
      ring.advance();
    }
  });
}

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
