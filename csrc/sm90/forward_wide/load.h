// The producers of the wide kernel: all tiles' Q, K and V, by TMA to both CTAs of a cluster, or gathered.
#pragma once

#include "tma/box_loader.h"
#include "tma/gather.h"
#include "tma/kernel_args.h"
#include "tma/q_load.h"
#include "tma/tile_loop.h"

namespace broadhead::sm90 {

using namespace tma;

// The tile's Q: `next_stage` gives the stages of its first columns.
template <class Traits, class NextStage>
BROADHEAD_DEVICE void load_wide_q(const KernelArgs& args, const TileState<typename Traits::Element>& state,
                                  typename Traits::SharedStorage& smem, bool loads, std::uint32_t q_parity,
                                  const NextStage& next_stage) {
  using QLayout = typename Traits::QLayout;
  using QkLayout = typename Traits::KLayout;  // of q's columns beside qv's
  constexpr int kSubtiles = Traits::ScoreLayout::kSubtiles;
  constexpr int kFirst = Traits::kQRegisterChunks * kSubtiles;
  const QMap& map = Traits::kWithQv ? args.maps.qv : args.maps.q;
  const QCoordinates at = q_coordinates(map, state);
  const int rows = args.plan.rows_per_tile;
  if (loads) {
    prefetch_q<QLayout>(map, at);
    if constexpr (Traits::kWithQv) prefetch_q<QkLayout>(args.maps.q, q_coordinates(args.maps.q, state));
  }
  for (int chunk = 0; chunk < Traits::kQRegisterChunks; ++chunk) {
    const std::uint32_t stage = next_stage();
    if (loads) {
      load_q<QLayout, Traits::kTileM>(map, at, rows, smem_address(smem.ring[stage]), smem.full[stage],
                                      chunk * kSubtiles, kSubtiles);
    } else if (args.maps.gather) {
      smem.full[stage].arrive();  // every thread's arrival is expected
    }
  }
  barrier_wait(smem.q_empty, q_parity ^ 1);
  if (!loads) return;
  std::uint32_t target = smem_address(smem.q);
  if constexpr (Traits::kWithQv) {
    load_q<QkLayout, Traits::kTileM>(args.maps.q, q_coordinates(args.maps.q, state), rows, target, smem.q_full);
  }
  target += Traits::kQSharedSubtile * Traits::kTileM * QLayout::kRowBytes;
  load_q<QLayout, Traits::kTileM>(map, at, rows, target, smem.q_full, kFirst, QLayout::kSubtiles - kFirst);
}

// Two warps load by TMA, one K and the other V. In a cluster these go to both CTAs, each loads half of a stage.
//
// Each warp fills a ring, of K or of V, in order. Q's first columns come through the ring of K; those of absorbed MLA
// through that of V, as K has a buffer beside it. A warp that filled only some stages of a ring would not see all their
// phases: the other CTA's O may be more than a fill behind.
template <class Traits>
struct WideLoader {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;

  const KernelArgs& args;
  Storage& smem;
  const std::uint32_t rank;
  typename Traits::KRing k_ring;  // not used with qv
  typename Traits::VRing v_ring;
  std::uint32_t q_parity = 0;
  std::uint32_t k_parity = 0;

  BROADHEAD_DEVICE WideLoader(const KernelArgs& args_, Storage& smem_)
      : args(args_), smem(smem_), rank(Traits::kCluster > 1 ? cute::block_rank_in_cluster() : 0) {}

  template <class Ring>
  BROADHEAD_DEVICE std::uint32_t next_stage(Ring& ring) {
    const std::uint32_t stage = ring.stage();
    const std::uint32_t parity = ring.parity();
    ring.advance();  // ahead of the wait: behind it every instruction counts
    barrier_wait(smem.empty[stage], parity ^ 1);
    return stage;
  }

  BROADHEAD_DEVICE void wait_k() {
    barrier_wait(smem.k_empty, k_parity ^ 1);
    k_parity ^= 1;
  }

  BROADHEAD_DEVICE void load_q(const TileState<Element>& state, bool loads) {
    load_wide_q<Traits>(args, state, smem, loads, q_parity, [&] {
      if constexpr (Traits::kWithQv) {
        return next_stage(v_ring);
      } else {
        return next_stage(k_ring);
      }
    });
    q_parity ^= 1;
  }

  BROADHEAD_DEVICE BoxPlace place_of(const TileState<Element>& state, const KvMap& map, int block) const {
    const AttnParams& params = args.params;
    return params.page_table != nullptr && block >= state.range.begin
               ? box_place(state.source, first_key_of<Traits>(state, block), Traits::kTileN, map.box_rows,
                           params.page_size)
               : BoxPlace{0, -1};
  }

  template <class Layout, int kStageKeys>
  BROADHEAD_DEVICE auto boxes_of(const TileState<Element>& state, const KvMap& map) const {
    const AttnParams& params = args.params;
    return BoxLoader<Layout, Traits::kTileN, kStageKeys, Traits::kCluster, Traits::kTail>(
        map, kv_coordinates(map, params, state), params.page_table != nullptr, rank);
  }

  BROADHEAD_DEVICE void load_k_tile(const TileState<Element>& state, bool leader) {
    using Layout = typename Traits::KLayout;
    const KvMap& map = args.maps.k;
    const BlockRange range = state.range;
    const bool paged = args.params.page_table != nullptr;
    BoxPlace place = place_of(state, map, range.end - 1);
    if constexpr (!Traits::kWithQv) load_q(state, leader);
    auto boxes = boxes_of<Layout, Traits::kTileN>(state, map);
    for (int block = range.end - 1; block >= range.begin; --block) {
      boxes.take(existing_place(args.params, place), first_key_of<Traits>(state, block));
      boxes.prepare(0);
      auto& missing_keys = smem.missing[Traits::kWithQv ? 0 : k_ring.stage()];
      const bool note = paged && missing_keys.changes(boxes.is_missing(args.params), 0);
      place = place_of(state, map, block - 1);  // an n_block ahead, so that its latency is hidden
      if (leader) want_next(smem.next_wanted, range, block);
      if constexpr (Traits::kWithQv) {
        wait_k();
        if (note) missing_keys.note_boxes(boxes.is_missing(args.params), map.box_rows);
        boxes.load(0, smem_address(smem.k), smem.k_full);
      } else {
#pragma unroll 1
        for (int chunk = 0; chunk < Traits::kKChunks; ++chunk) {
          const std::uint32_t stage = next_stage(k_ring);
          if (note && chunk == 0) missing_keys.note_boxes(boxes.is_missing(args.params), map.box_rows);
          boxes.load(chunk * Layout::kSubtiles, smem_address(smem.ring[stage]), smem.full[stage]);
        }
      }
    }
  }

  BROADHEAD_DEVICE void load_v_tile(const TileState<Element>& state, bool leader) {
    using Layout = typename Traits::VLayout;
    const KvMap& map = args.maps.v;
    const BlockRange range = state.range;
    BoxPlace place = place_of(state, map, range.end - 1);
    if constexpr (Traits::kWithQv) load_q(state, leader);
    auto boxes = boxes_of<Layout, Traits::kVKeys>(state, map);
    for (int block = range.end - 1; block >= range.begin; --block) {
      boxes.take(existing_place(args.params, place), first_key_of<Traits>(state, block));
      place = place_of(state, map, block - 1);
#pragma unroll 1
      for (int chunk = 0; chunk < Traits::kVChunks; ++chunk) {
        // V is cut by keys; of absorbed MLA by columns.
        if (!Traits::kWithQv || chunk == 0) boxes.prepare(Traits::kWithQv ? 0 : chunk);
        const std::uint32_t stage = next_stage(v_ring);
        boxes.load(Traits::kWithQv ? chunk * Layout::kSubtiles : 0, smem_address(smem.ring[stage]), smem.full[stage]);
      }
    }
  }

  BROADHEAD_DEVICE void run(bool loads_k) {
    const bool leader = threadIdx.x % 32 == 0;
    if (leader && loads_k) {
      cute::prefetch_tma_descriptor(&args.maps.q.map);
      cute::prefetch_tma_descriptor(&args.maps.k.box);
    }
    if (leader && !loads_k) {
      cute::prefetch_tma_descriptor(&args.maps.v.box);
      if constexpr (Traits::kWithQv) cute::prefetch_tma_descriptor(&args.maps.qv.map);
    }
    for_each_tile(smem, leader, [&](const TileState<Element>& state) {
      const BlockRange range = state.range;
      if (leader && loads_k) want_next(smem.next_wanted, range, range.end);
      if (range.begin >= range.end) return;
      if (loads_k) {
        load_k_tile(state, leader);
      } else {
        load_v_tile(state, leader);
      }
    });
  }

  using Rows = GatheredRows<Traits::kTileN, Traits::kLoaderWarps>;

  BROADHEAD_DEVICE void gather_k(const TileState<Element>& state, const Rows& rows, int warp) {
    using Layout = typename Traits::KLayout;
    const AttnParams& params = args.params;
    auto& missing_keys = smem.missing[Traits::kWithQv ? 0 : k_ring.stage()];
    const bool note = rows.changes(params, missing_keys, warp);
    if constexpr (Traits::kWithQv) wait_k();
    for (int chunk = 0; chunk < Traits::kKChunks; ++chunk) {
      std::uint32_t target;
      Barrier* full;
      if constexpr (Traits::kWithQv) {
        target = smem_address(smem.k);
        full = &smem.k_full;
      } else {
        const std::uint32_t stage = next_stage(k_ring);
        target = smem_address(smem.ring[stage]);
        full = &smem.full[stage];
      }
      if (note && chunk == 0) rows.note(params, missing_keys, 0, warp, warp);
      gather_stage<Layout>(params, rows, state.source.k, params.k_strides, 0, Traits::kTileN / 8,
                           chunk * Traits::kKChunk, params.head_dim, target, *full, warp);
    }
  }

  BROADHEAD_DEVICE void gather_v(const TileState<Element>& state, const Rows& rows, int warp) {
    const AttnParams& params = args.params;
    for (int chunk = 0; chunk < Traits::kVChunks; ++chunk) {
      constexpr int kGroups = Traits::kVKeys / 8;
      const std::uint32_t stage = next_stage(v_ring);
      gather_stage<typename Traits::VLayout>(params, rows, state.source.v, params.v_strides,
                                             Traits::kWithQv ? 0 : chunk * kGroups, kGroups,
                                             Traits::kWithQv ? chunk * Traits::kScoreCols : 0, params.head_dim_v,
                                             smem_address(smem.ring[stage]), smem.full[stage], warp);
    }
  }

  // Three warps gather K and V, each CTA for itself; the first loads Q.
  BROADHEAD_DEVICE void run_gathering(int warp) {
    const bool leader = threadIdx.x % 32 == 0;
    const bool first = leader && warp == 0;
    for_each_tile(smem, leader, [&](const TileState<Element>& state) {
      const BlockRange range = state.range;
      if (first) want_next(smem.next_wanted, range, range.end);
      if (range.begin >= range.end) return;
      const auto read = [&](Rows& rows, int block) {
        if (block >= range.begin)
          rows.read(state.source, first_key_of<Traits>(state, block), args.params.page_size, warp);
      };
      Rows rows, above, next;
      read(rows, range.end - 1);
      load_q(state, first);
      for (int block = range.end - 1; block >= range.begin; --block) {
        read(next, block - 1);  // an n_block ahead, so that its latency is hidden
        if (first) want_next(smem.next_wanted, range, block);
        gather_k(state, rows, warp);
        if (Traits::kWithQv) {
          gather_v(state, rows, warp);
        } else if (block < range.end - 1) {
          gather_v(state, above, warp);
        }
        above = rows;
        rows = next;
      }
      if (!Traits::kWithQv) gather_v(state, above, warp);
    });
  }
};

}  // namespace broadhead::sm90
