// The gathering producer of the e4m3 kernel: one warp brings K and V where TMA can not.
#pragma once

#include "sm90/load.h"
#include "tma/gather.h"

namespace broadhead::sm90 {

using namespace tma;

// One warp gathers everything: the others transpose. It has registers for the pages of half an n_block.
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
        rows.read(source, first_key_of<Traits>(state, block) + piece * kKeys, params.page_size, 0);
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

}  // namespace broadhead::sm90
