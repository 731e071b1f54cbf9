// The gathering producer of the forward kernel: three warps bring K and V where TMA can not.
#pragma once

#include "sm90/load.h"
#include "tma/gather.h"

namespace broadhead::sm90 {

using namespace tma;

// Three warps: all tiles' K and V; the first also loads Q.
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
      if (block >= range.begin) rows.read(source, state.first_key(block, Traits::kTileN), params.page_size, warp);
    };
    Rows rows, next;
    read(rows, range.end - 1);
    read(next, range.end - 2);  // an n_block ahead, so that its latency is hidden
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
