// The loaders of the kernels for head_dim <= 256: all tiles' Q, K and V, by TMA or gathered.
#pragma once

#include "sm90/kv_load.h"

namespace broadhead::sm90 {

// `at`: worked out before; behind the wait nothing but the loads is left.
template <class Traits>
BROADHEAD_DEVICE void wait_and_load_q(const KernelArgs& args, const QCoordinates& at,
                                      typename Traits::SharedStorage& smem, bool loads, std::uint32_t& parity) {
  barrier_wait(smem.q_empty, parity ^ 1);
  parity ^= 1;
  if (loads) {
    load_q<typename Traits::QLayout, Traits::kTileM>(args.maps.q, at, args.plan.rows_per_tile, smem_address(smem.q),
                                                     smem.q_full);
  }
}

// One warp: of all tiles Q and K (`loads_k`), V (`loads_v`), or everything, by TMA. K of a tile's first block comes
// ahead of its Q, which waits for the last S of the tile before.
template <class Traits>
BROADHEAD_DEVICE void load_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem, bool loads_k,
                                 bool loads_v) {
  using Element = typename Traits::Element;
  const AttnParams& params = args.params;
  const bool paged = params.page_table != nullptr;
  const bool leader = threadIdx.x % 32 == 0;
  if (leader && loads_k) {
    prefetch_map(&args.maps.q.map);
    prefetch_map(&args.maps.k.box);
  }
  if (leader && loads_v) prefetch_map(&args.maps.v.box);
  RingState<Traits::kStages> ring;  // of K and of V
  std::uint32_t q_parity = 0;
  for_each_tile(smem, leader, [&](const TileState<Element>& state) {
    const BlockRange range = state.range;
    if (leader && loads_k) want_next(smem.next_wanted, range, range.end);
    if (range.begin >= range.end) return;
    const QCoordinates q_at = q_coordinates(args.maps.q, state);
    if (leader && loads_k) prefetch_q<typename Traits::QLayout>(args.maps.q, q_at);
    BoxLoader<typename Traits::KLayout, Traits::kTileN, Traits::kTileN, 1, Traits::kTail> k_boxes(
        args.maps.k, kv_coordinates(args.maps.k, params, state), paged, 0);
    BoxLoader<typename Traits::VLayout, Traits::kTileN, Traits::kTileN, 1, Traits::kTail> v_boxes(
        args.maps.v, kv_coordinates(args.maps.v, params, state), paged, 0);
    const int box_rows = args.maps.k.box_rows;  // V's, too
    const auto place_of = [&](int block) {
      return paged && block >= range.begin
                 ? box_place(state.source, block * Traits::kTileN, Traits::kTileN, box_rows, params.page_size)
                 : BoxPlace{0, -1};
    };
    BoxPlace place = place_of(range.end - 1);
    for (int block = range.end - 1; block >= range.begin; --block) {
      if (paged) place = existing_place(params, place);
      const std::uint32_t stage = ring.stage();
      bool note = false;
      if (loads_k) {
        k_boxes.take(place, block * Traits::kTileN);
        k_boxes.prepare(0);
        note = paged && smem.missing[stage].changes(k_boxes.is_missing(params), 0);
      }
      if (loads_v) {
        v_boxes.take(place, block * Traits::kTileN);
        v_boxes.prepare(0);
      }
      place = place_of(block - 1);  // a block ahead, so that its latency is hidden
      if (loads_k) {
        if (leader) want_next(smem.next_wanted, range, block);
        barrier_wait(smem.k_empty[stage], ring.parity() ^ 1);
        if (note) smem.missing[stage].note_boxes(k_boxes.is_missing(params), box_rows);
        k_boxes.load(0, smem_address(smem.k[stage]), smem.k_full[stage]);
        if (block == range.end - 1) {
          wait_and_load_q<Traits>(args, q_at, smem, leader, q_parity);
        }
      }
      if (loads_v) {
        barrier_wait(smem.v_empty[stage], ring.parity() ^ 1);
        v_boxes.load(0, smem_address(smem.v[stage]), smem.v_full[stage]);
      }
      ring.advance();
    }
  });
}

// The same by three warps that gather K and V; the first loads Q.
template <class Traits>
BROADHEAD_DEVICE void gather_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem, int warp) {
  using Element = typename Traits::Element;
  using Rows = GatheredRows<Traits::kTileN, Traits::kLoaderWarps>;
  constexpr int kGroups = Traits::kTileN / 8;
  const AttnParams& params = args.params;
  const bool leader = threadIdx.x % 32 == 0;
  RingState<Traits::kStages> k_ring, v_ring;
  std::uint32_t q_parity = 0;
  for_each_tile(smem, leader, [&](const TileState<Element>& state) {
    const KvSource<Element>& source = state.source;
    const BlockRange range = state.range;
    const bool first = leader && warp == 0;
    if (first) want_next(smem.next_wanted, range, range.end);
    if (range.begin >= range.end) return;
    const QCoordinates q_at = q_coordinates(args.maps.q, state);
    if (first) prefetch_q<typename Traits::QLayout>(args.maps.q, q_at);
    const auto load_k = [&](const Rows& rows) {
      auto& missing = smem.missing[k_ring.stage()];
      const bool note = rows.changes(params, missing, warp);
      barrier_wait(smem.k_empty[k_ring.stage()], k_ring.parity() ^ 1);
      if (note) rows.note(params, missing, 0, warp, warp);
      gather_stage<typename Traits::KLayout>(params, rows, source.k, params.k_strides, 0, kGroups, 0, params.head_dim,
                                             smem_address(smem.k[k_ring.stage()]), smem.k_full[k_ring.stage()], warp);
      k_ring.advance();
    };
    const auto load_v = [&](const Rows& rows) {
      barrier_wait(smem.v_empty[v_ring.stage()], v_ring.parity() ^ 1);
      gather_stage<typename Traits::VLayout>(params, rows, source.v, params.v_strides, 0, kGroups, 0, params.head_dim_v,
                                             smem_address(smem.v[v_ring.stage()]), smem.v_full[v_ring.stage()], warp);
      v_ring.advance();
    };
    const auto read = [&](Rows& rows, int block) {
      if (block >= range.begin) rows.read(source, block * Traits::kTileN, params.page_size, warp);
    };
    Rows rows, next;
    read(rows, range.end - 1);
    read(next, range.end - 2);  // a block ahead, so that its latency is hidden
    if (first) want_next(smem.next_wanted, range, range.end - 1);
    load_k(rows);
    // The others do not wait: with their K on its way they could miss a whole phase.
    if (warp == 0) wait_and_load_q<Traits>(args, q_at, smem, leader, q_parity);
    for (int block = range.end - 2; block >= range.begin; --block) {
      if (first) want_next(smem.next_wanted, range, block);
      const Rows v_rows = rows;
      rows = next;
      read(next, block - 1);
      load_k(rows);
      load_v(v_rows);
    }
    load_v(rows);
  });
}

}  // namespace broadhead::sm90
