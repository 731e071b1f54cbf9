// The TMA producer of the kernels for head_dim <= 256: Q, K and V of all tiles.
#pragma once

#include "tma/box_loader.h"
#include "tma/kernel_args.h"
#include "tma/q_load.h"
#include "tma/tile_loop.h"

namespace broadhead::sm90 {

using namespace tma;

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

// One warp loads Q and K (`loads_k`), V (`loads_v`), or everything, of all tiles, by TMA. K of a tile's first n_block
// comes ahead of its Q, which waits for the last S of the tile before.
template <class Traits>
BROADHEAD_DEVICE void load_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem, bool loads_k,
                                 bool loads_v) {
  using Element = typename Traits::Element;
  const AttnParams& params = args.params;
  const bool paged = is_paged<Traits>(params);
  const bool leader = threadIdx.x % 32 == 0;
  if (leader && loads_k) {
    cute::prefetch_tma_descriptor(&args.maps.q.map);
    cute::prefetch_tma_descriptor(&args.maps.k.box);
  }
  if (leader && loads_v) cute::prefetch_tma_descriptor(&args.maps.v.box);
  RingState<Traits::kStages> ring;  // K and V have one each, and are at the same stage
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
        args.maps.v, kv_coordinates(args.maps.v, params, state), paged, 0,
        Traits::kPlainCall && Traits::kFillsDense && has_dense_keys(params));
    const int box_rows = args.maps.k.box_rows;  // V's, too
    const BlockGap gap = Traits::kPlainCall ? BlockGap{0, 0} : state.gap;
    const auto place_of = [&](int block) {
      return paged && block >= range.begin ? box_place(state.source, gap.place(block) * Traits::kTileN, Traits::kTileN,
                                                       box_rows, params.page_size)
                                           : BoxPlace{0, -1};
    };
    BoxPlace place = place_of(range.end - 1);
    for (int block = range.end - 1; block >= range.begin; --block) {
      if (paged) place = existing_place(params, place);
      const std::uint32_t stage = ring.stage();
      bool note = false;
      if (loads_k) {
        k_boxes.take(place, gap.place(block) * Traits::kTileN);
        k_boxes.prepare(0);
        note = paged && smem.missing[stage].changes(k_boxes.is_missing(params), 0);
      }
      if (loads_v) {
        v_boxes.take(place, gap.place(block) * Traits::kTileN);
        v_boxes.prepare(0);
      }
      place = place_of(block - 1);  // an n_block ahead, so that its latency is hidden
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

}  // namespace broadhead::sm90
