// The Hopper forward kernel for 256 < head_dim <= 512 and for absorbed MLA: persistent clusters of two blocks; see
// wide_traits.h.
#pragma once

#include "sm90/kv_load.h"
#include "sm90/wide_output.h"

namespace broadhead::sm90 {

// The ring's order of a tile: Q's first columns, K of the last block, then K of each block before V of the one above.
// Of absorbed MLA: Q's, then V block by block; K beside it.
template <class Traits, class LoadQ, class LoadK, class LoadV>
BROADHEAD_DEVICE void fill_ring(BlockRange range, bool asks, Barrier& next_wanted, const LoadQ& load_q_stage,
                                const LoadK& load_k, const LoadV& load_v) {
  load_q_stage();
  load_k(range.end - 1);
  if constexpr (Traits::kWithQv) load_v(range.end - 1);
  for (int block = range.end - 2; block >= range.begin; --block) {
    if (asks && block == range.begin + kBlocksAhead) barrier_arrive(next_wanted);
    load_k(block);
    load_v(Traits::kWithQv ? block : block + 1);
  }
  if constexpr (!Traits::kWithQv) load_v(range.begin);
}

// The tile's Q: `next_stage` gives the stages of its first columns.
template <class Traits, class NextStage>
BROADHEAD_DEVICE void load_wide_q(const KernelArgs& args, const TileState<typename Traits::Element>& state,
                                  typename Traits::SharedStorage& smem, bool loads, std::uint32_t q_parity,
                                  const NextStage& next_stage) {
  using QLayout = typename Traits::QLayout;
  constexpr int kSubtiles = Traits::ScoreLayout::kSubtiles;
  constexpr int kFirst = Traits::kQRegisterChunks * kSubtiles;
  const QMap& map = Traits::kWithQv ? args.maps.qv : args.maps.q;
  for (int chunk = 0; chunk < Traits::kQRegisterChunks; ++chunk) {
    const std::uint32_t stage = next_stage();
    if (loads) {
      load_q_columns<QLayout, Traits::kTileM>(map, args, state, smem_address(smem.ring[stage]), smem.full[stage],
                                              chunk * kSubtiles, kSubtiles);
    } else if (args.maps.gather) {
      barrier_arrive(smem.full[stage]);  // every thread's arrival is expected
    }
  }
  barrier_wait(smem.q_empty, q_parity ^ 1);
  if (!loads) return;
  std::uint32_t target = smem_address(smem.q);
  if constexpr (Traits::kWithQv) {
    using QkLayout = typename Traits::KLayout;  // of q's columns
    load_q<QkLayout, Traits::kTileM>(args, state, target, smem.q_full);
  }
  target += Traits::kQSharedSubtile * Traits::kTileM * QLayout::kRowBytes;
  load_q_columns<QLayout, Traits::kTileM>(map, args, state, target, smem.q_full, kFirst, QLayout::kSubtiles - kFirst);
}

// One warp: everything by TMA. K and V go to both blocks of the cluster, each loads half of a stage.
template <class Traits>
BROADHEAD_DEVICE void load_wide_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  const AttnParams& params = args.params;
  const bool paged = params.page_table != nullptr;
  const bool leader = threadIdx.x % 32 == 0;
  const std::uint32_t rank = cluster_rank();
  SlotState slot;
  RingState<Traits::kStages> ring;
  std::uint32_t q_parity = 0;
  const auto next_stage = [&]() {
    barrier_wait(smem.empty[ring.stage()], ring.parity() ^ 1);
    const std::uint32_t stage = ring.stage();
    ring.advance();
    return stage;
  };
  std::uint32_t k_parity = 0;
  const auto next_k = [&]() {
    if constexpr (Traits::kWithQv) {
      barrier_wait(smem.k_empty, k_parity ^ 1);
      k_parity ^= 1;
    }
  };
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const TileSlot<Element>& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    const TileState<Element>& state = tile.state;
    const BlockRange range = state.range;
    if (leader && range.end - range.begin < kBlocksAhead + 2) barrier_arrive(smem.next_wanted);
    if (range.begin < range.end) {
      const KvCoordinates k_at = kv_coordinates(args.maps.k, params, state);
      const KvCoordinates v_at = kv_coordinates(args.maps.v, params, state);
      const auto pages_of = [&](const KvMap& map, int block) {
        return paged && block >= range.begin
                   ? box_page(state.source, block * Traits::kTileN, Traits::kTileN, map.box_rows, params.page_size)
                   : BoxPage{-1, 0};
      };
      // Read a block ahead, so that the latency is hidden.
      BoxPage k_pages = pages_of(args.maps.k, range.end - 1);
      BoxPage v_pages = pages_of(args.maps.v, range.end - 1);
      fill_ring<Traits>(
          range, leader, smem.next_wanted,
          [&] {
            load_wide_q<Traits>(args, state, smem, leader, q_parity, next_stage);
            q_parity ^= 1;
          },
          [&](int block) {
            if constexpr (Traits::kWithQv) {
              next_k();
              load_stage<typename Traits::KLayout, Traits::kTileN, Traits::kCluster>(
                  args.maps.k, k_at, paged, k_pages, 0, block * Traits::kTileN, 0, smem_address(smem.k), smem.k_full,
                  rank);
            } else {
              const BoxPage next = pages_of(args.maps.k, block - 1);
              for (int chunk = 0; chunk < Traits::kKChunks; ++chunk) {
                const std::uint32_t stage = next_stage();
                load_stage<typename Traits::KLayout, Traits::kTileN, Traits::kCluster>(
                    args.maps.k, k_at, paged, k_pages, 0, block * Traits::kTileN, chunk * Traits::KLayout::kSubtiles,
                    smem_address(smem.ring[stage]), smem.full[stage], rank);
              }
              k_pages = next;
            }
          },
          [&](int block) {
            // Cut by columns V has the boxes that K has.
            BoxPage& pages = Traits::kWithQv ? k_pages : v_pages;
            const BoxPage next = pages_of(args.maps.v, block - 1);
            for (int chunk = 0; chunk < Traits::kVChunks; ++chunk) {
              const int keys = Traits::kWithQv ? 0 : chunk;
              const int columns = Traits::kWithQv ? chunk : 0;
              const std::uint32_t stage = next_stage();
              load_stage<typename Traits::VLayout, Traits::kVKeys, Traits::kCluster>(
                  args.maps.v, v_at, paged, pages, keys * args.maps.v.boxes,
                  block * Traits::kTileN + keys * Traits::kVKeys, columns * Traits::VLayout::kSubtiles,
                  smem_address(smem.ring[stage]), smem.full[stage], rank);
            }
            pages = next;
          });
    }
    __syncwarp();
    if (leader) barrier_arrive(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

// Three warps gather K and V, each block for itself.
template <class Traits>
BROADHEAD_DEVICE void gather_wide_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem, int warp) {
  using Element = typename Traits::Element;
  const AttnParams& params = args.params;
  const bool leader = threadIdx.x % 32 == 0;
  SlotState slot;
  RingState<Traits::kStages> ring;
  std::uint32_t q_parity = 0;
  const auto next_stage = [&]() {
    barrier_wait(smem.empty[ring.stage()], ring.parity() ^ 1);
    const std::uint32_t stage = ring.stage();
    ring.advance();
    return stage;
  };
  std::uint32_t k_parity = 0;
  const auto next_k = [&]() {
    if constexpr (Traits::kWithQv) {
      barrier_wait(smem.k_empty, k_parity ^ 1);
      k_parity ^= 1;
    }
  };
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const TileSlot<Element>& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    const TileState<Element>& state = tile.state;
    const KvSource<Element>& source = state.source;
    const BlockRange range = state.range;
    if (leader && warp == 0 && range.end - range.begin < kBlocksAhead + 2) barrier_arrive(smem.next_wanted);
    if (range.begin < range.end) {
      GatheredRows<Traits::kTileN, Traits::kLoaderWarps> rows;
      fill_ring<Traits>(
          range, leader && warp == 0, smem.next_wanted,
          [&] {
            load_wide_q<Traits>(args, state, smem, leader && warp == 0, q_parity, next_stage);
            q_parity ^= 1;
          },
          [&](int block) {
            rows.read(source, block * Traits::kTileN, params.page_size, warp);
            const int key0 = source.leftpad + block * Traits::kTileN;
            if constexpr (Traits::kWithQv) {
              next_k();
              gather_stage<typename Traits::KLayout>(rows, source.k, params.k_strides, key0, params.page_size, 0,
                                                     params.head_dim, smem_address(smem.k), smem.k_full, warp);
            } else {
              for (int chunk = 0; chunk < Traits::kKChunks; ++chunk) {
                const std::uint32_t stage = next_stage();
                gather_stage<typename Traits::KLayout>(rows, source.k, params.k_strides, key0, params.page_size,
                                                       chunk * Traits::kKChunk, params.head_dim,
                                                       smem_address(smem.ring[stage]), smem.full[stage], warp);
              }
            }
          },
          [&](int block) {
            if constexpr (Traits::kWithQv) {  // the rows of K
              for (int chunk = 0; chunk < Traits::kVChunks; ++chunk) {
                const std::uint32_t stage = next_stage();
                gather_stage<typename Traits::VLayout>(rows, source.v, params.v_strides,
                                                       source.leftpad + block * Traits::kTileN, params.page_size,
                                                       chunk * Traits::kScoreCols, params.head_dim_v,
                                                       smem_address(smem.ring[stage]), smem.full[stage], warp);
              }
            } else {
              for (int chunk = 0; chunk < Traits::kVChunks; ++chunk) {
                const int key0 = block * Traits::kTileN + chunk * Traits::kVKeys;
                GatheredRows<Traits::kVKeys, Traits::kLoaderWarps> v_rows;
                v_rows.read(source, key0, params.page_size, warp);
                const std::uint32_t stage = next_stage();
                gather_stage<typename Traits::VLayout>(v_rows, source.v, params.v_strides, source.leftpad + key0,
                                                       params.page_size, 0, params.head_dim_v,
                                                       smem_address(smem.ring[stage]), smem.full[stage], warp);
              }
            }
          });
    }
    __syncwarp();
    if (leader) barrier_arrive(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) wide_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    const int loaders = args.maps.gather ? Traits::kLoaderWarps : 1;
    for (int i = 0; i < kTileSlots; ++i) {
      barrier_init(smem.tile_full[i], 1);
      barrier_init(smem.tile_empty[i], 12 + loaders);
      barrier_init(smem.mailbox.full[i], 1);
      barrier_init(smem.mailbox.empty[i], Traits::kCluster);
      barrier_init(smem.p_full[i], 4);
      barrier_init(smem.p_empty[i], 8);
      barrier_init(smem.inverse_full[i], 4);
      barrier_init(smem.inverse_empty[i], 8);
    }
    barrier_init(smem.next_wanted, 1);
    barrier_init(smem.q_full, Traits::kWithQv ? 2 : 1);
    barrier_init(smem.q_empty, 4);
    const int arrivals = args.maps.gather ? Traits::kLoaderWarps * 32 : 1;
    if constexpr (Traits::kWithQv) {
      barrier_init(smem.k_full, arrivals);
      barrier_init(smem.k_empty, Traits::kReleases * Traits::kCluster);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      barrier_init(smem.full[i], arrivals);
      barrier_init(smem.empty[i], Traits::kReleases * Traits::kCluster);
    }
    barrier_init_fence();
  }
  __syncthreads();
  cluster_sync();

  // Each role ends by itself, or ptxas would not see what registers it has. No block leaves before the other: until
  // then that one may write into its shared memory.
  if (warp < 4) {
    give_registers<Traits::kProducerRegisters>();
    if (warp == Traits::kSchedulerWarp) {
      post_tiles<Traits>(args, smem);
    } else if (args.maps.gather) {
      gather_wide_tiles<Traits>(args, smem, warp);
    } else if (warp == 0) {
      load_wide_tiles<Traits>(args, smem);
    }
    __syncwarp();
    cluster_sync();
  } else if (warp < 8) {
    take_registers<Traits::kScoreRegisters>();
    ScoreWarpgroup<Traits>(args, smem).run();
    __syncwarp();
    cluster_sync();
  } else {
    take_registers<Traits::kOutputRegisters>();
    OutputWarpgroup<Traits>(args, smem, warp / 4 - 2).run();
    __syncwarp();
    cluster_sync();
  }
}

}  // namespace broadhead::sm90
