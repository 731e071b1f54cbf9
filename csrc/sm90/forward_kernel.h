// The Hopper forward kernel for head_dim <= 256: one persistent block an SM, a producer warpgroup and consumers.
//
// Producer warpgroup: warp 0 loads Q, K and V by TMA (warps 0 to 2 gather K and V where TMA can not), warp 3 takes
// tiles. Consumers: 64 query rows each.
#pragma once

#include "sm90/forward_consumer.h"
#include "sm90/kv_load.h"

namespace broadhead::sm90 {

// One warp: all tiles' Q, K and V by TMA. K runs a block ahead of V, as the consumers need them.
template <class Traits>
BROADHEAD_DEVICE void load_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  const AttnParams& params = args.params;
  const bool paged = params.page_table != nullptr;
  const bool leader = threadIdx.x % 32 == 0;
  SlotState slot;
  RingState<Traits::kStages> k_ring, v_ring;
  std::uint32_t q_parity = 0;
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const TileSlot<Element>& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    const TileState<Element>& state = tile.state;
    const BlockRange range = state.range;
    if (leader && range.end - range.begin < kBlocksAhead + 2) barrier_arrive(smem.next_wanted);
    if (range.begin < range.end) {
      barrier_wait(smem.q_empty, q_parity ^ 1);
      q_parity ^= 1;
      if (leader) load_q<typename Traits::QLayout, Traits::kTileM>(args, state, smem_address(smem.q), smem.q_full);
      const KvCoordinates k_at = kv_coordinates(args.maps.k, params, state);
      const KvCoordinates v_at = kv_coordinates(args.maps.v, params, state);
      const int box_rows = args.maps.k.box_rows;
      const auto pages_of = [&](int block) {
        return paged && block >= range.begin
                   ? box_page(state.source, block * Traits::kTileN, Traits::kTileN, box_rows, params.page_size)
                   : BoxPage{-1, 0};
      };
      const auto load_k = [&](int block, BoxPage pages) {
        barrier_wait(smem.k_empty[k_ring.stage()], k_ring.parity() ^ 1);
        load_stage<typename Traits::KLayout, Traits::kTileN, 1>(
            args.maps.k, k_at, paged, pages, 0, block * Traits::kTileN, 0,
            smem_address(smem.k[k_ring.stage()]), smem.k_full[k_ring.stage()], 0);
        k_ring.advance();
      };
      const auto load_v = [&](int block, BoxPage pages) {
        barrier_wait(smem.v_empty[v_ring.stage()], v_ring.parity() ^ 1);
        load_stage<typename Traits::VLayout, Traits::kTileN, 1>(
            args.maps.v, v_at, paged, pages, 0, block * Traits::kTileN, 0,
            smem_address(smem.v[v_ring.stage()]), smem.v_full[v_ring.stage()], 0);
        v_ring.advance();
      };
      BoxPage pages = pages_of(range.end - 1);
      BoxPage next_pages = pages_of(range.end - 2);
      load_k(range.end - 1, pages);
      for (int block = range.end - 2; block >= range.begin; --block) {
        const BoxPage later = pages_of(block - 1);  // a block ahead, so that its latency is hidden
        if (leader && block == range.begin + kBlocksAhead) barrier_arrive(smem.next_wanted);
        load_k(block, next_pages);
        load_v(block + 1, pages);
        pages = next_pages;
        next_pages = later;
      }
      load_v(range.begin, pages);
    }
    __syncwarp();
    if (leader) barrier_arrive(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

// The same by three warps that gather K and V; the first loads Q.
template <class Traits>
BROADHEAD_DEVICE void gather_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem, int warp) {
  using Element = typename Traits::Element;
  using Rows = GatheredRows<Traits::kTileN, Traits::kLoaderWarps>;
  const AttnParams& params = args.params;
  const bool leader = threadIdx.x % 32 == 0;
  SlotState slot;
  RingState<Traits::kStages> k_ring, v_ring;
  std::uint32_t q_parity = 0;
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const TileSlot<Element>& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    const TileState<Element>& state = tile.state;
    const KvSource<Element>& source = state.source;
    const BlockRange range = state.range;
    if (leader && warp == 0 && range.end - range.begin < kBlocksAhead + 2) barrier_arrive(smem.next_wanted);
    if (range.begin < range.end) {
      barrier_wait(smem.q_empty, q_parity ^ 1);
      q_parity ^= 1;
      if (leader && warp == 0) {
        load_q<typename Traits::QLayout, Traits::kTileM>(args, state, smem_address(smem.q), smem.q_full);
      }
      Rows rows, v_rows;
      const auto load_k = [&](int block) {
        rows.read(source, block * Traits::kTileN, params.page_size, warp);
        barrier_wait(smem.k_empty[k_ring.stage()], k_ring.parity() ^ 1);
        gather_stage<typename Traits::KLayout>(
            rows, source.k, params.k_strides, source.leftpad + block * Traits::kTileN, params.page_size, 0,
            params.head_dim, smem_address(smem.k[k_ring.stage()]), smem.k_full[k_ring.stage()], warp);
        k_ring.advance();
      };
      const auto load_v = [&](int block) {
        barrier_wait(smem.v_empty[v_ring.stage()], v_ring.parity() ^ 1);
        gather_stage<typename Traits::VLayout>(
            v_rows, source.v, params.v_strides, source.leftpad + block * Traits::kTileN, params.page_size, 0,
            params.head_dim_v, smem_address(smem.v[v_ring.stage()]), smem.v_full[v_ring.stage()], warp);
        v_ring.advance();
      };
      load_k(range.end - 1);
      for (int block = range.end - 2; block >= range.begin; --block) {
        v_rows = rows;
        if (leader && warp == 0 && block == range.begin + kBlocksAhead) barrier_arrive(smem.next_wanted);
        load_k(block);
        load_v(block + 1);
      }
      v_rows = rows;
      load_v(range.begin);
    }
    __syncwarp();
    if (leader) barrier_arrive(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) forward_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    const int loaders = args.maps.gather ? Traits::kLoaderWarps : 1;
    const int fills = args.maps.gather ? Traits::kLoaderWarps * 32 : 1;
    for (int i = 0; i < kTileSlots; ++i) {
      barrier_init(smem.tile_full[i], 1);
      barrier_init(smem.tile_empty[i], Traits::kConsumerWarps + loaders);
    }
    barrier_init(smem.next_wanted, 1);
    barrier_init(smem.q_full, 1);
    barrier_init(smem.q_empty, Traits::kConsumerWarps);
    for (int i = 0; i < Traits::kStages; ++i) {
      barrier_init(smem.k_full[i], fills);
      barrier_init(smem.k_empty[i], Traits::kConsumerWarps);
      barrier_init(smem.v_full[i], fills);
      barrier_init(smem.v_empty[i], Traits::kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp < 4) {
    give_registers<Traits::kProducerRegisters>();
    if (warp == Traits::kSchedulerWarp) {
      post_tiles<Traits>(args, smem);
    } else if (args.maps.gather) {
      gather_tiles<Traits>(args, smem, warp);
    } else if (warp == 0) {
      load_tiles<Traits>(args, smem);
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, smem).run();
  }
}

}  // namespace broadhead::sm90
