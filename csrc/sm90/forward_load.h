// The loaders of the kernels for head_dim <= 256: all tiles' Q, K and V, by TMA or gathered.
#pragma once

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
            args.maps.k, k_at, paged, pages, 0, block * Traits::kTileN, 0, smem_address(smem.k[k_ring.stage()]),
            smem.k_full[k_ring.stage()], 0);
        k_ring.advance();
      };
      const auto load_v = [&](int block, BoxPage pages) {
        barrier_wait(smem.v_empty[v_ring.stage()], v_ring.parity() ^ 1);
        load_stage<typename Traits::VLayout, Traits::kTileN, 1>(
            args.maps.v, v_at, paged, pages, 0, block * Traits::kTileN, 0, smem_address(smem.v[v_ring.stage()]),
            smem.v_full[v_ring.stage()], 0);
        v_ring.advance();
      };
      if constexpr (Traits::kVBehindK) {
        // V is transposed before its use and wanted as early as K.
        BoxPage pages = pages_of(range.end - 1);
        for (int block = range.end - 1; block >= range.begin; --block) {
          const BoxPage next = pages_of(block - 1);  // a block ahead, so that its latency is hidden
          if (leader && block == range.begin + kBlocksAhead && block < range.end - 1) barrier_arrive(smem.next_wanted);
          load_k(block, pages);
          load_v(block, pages);
          pages = next;
        }
      } else {
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
      if constexpr (Traits::kVBehindK) {
        for (int block = range.end - 1; block >= range.begin; --block) {
          if (leader && block == range.begin + kBlocksAhead && block < range.end - 1) barrier_arrive(smem.next_wanted);
          load_k(block);
          v_rows = rows;
          load_v(block);
        }
      } else {
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
    }
    __syncwarp();
    if (leader) barrier_arrive(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

}  // namespace broadhead::sm90
