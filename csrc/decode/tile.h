// What a CTA keeps of the tile that it works on: mask, scale, and where each row goes.
#pragma once

#include "common/row_result.h"
#include "decode/rows.h"
#include "decode/traits.h"
#include "decode/workspace.h"

namespace broadhead::decode {

// Fills the CTA's tile. One thread calls this.
template <class Traits>
BROADHEAD_DEVICE void set_tile(const DecodeParams& params, const WorkItem& item, DecodeTile& tile) {
  const SeqlenInfo& seqlen = item.seqlen;
  const RowMap rows = tile_rows<Traits::kTileM>(params, seqlen, item.batch, item.m_block);
  tile.rows = rows;
  tile.mask = make_mask(params, seqlen, item.batch);
  tile.unmasked = params.sees_all ? KeyInterval{0, seqlen.seqlen_k}
                  : seqlen.seqlen_q == 1
                      ? tile.mask.unmasked_interval(0, 0)
                      : tile.mask.unmasked_interval(rows.token(0), rows.token(rows.end_row - rows.first_row - 1));
  float scale = params.softmax_scale;
  if constexpr (Traits::k8Bit) {
    const int kv_head = kv_head_of(params, item.head);
    const int batch = is_shared(params, item.batch) ? 0 : item.batch;
    scale *= descale(params.q_descale, params.q_descale_strides, batch, kv_head) *
             descale(params.k_descale, params.k_descale_strides, batch, kv_head);
    tile.scale.v_factor = descale(params.v_descale, params.v_descale_strides, batch, kv_head);
  }
  tile.scale.set(scale, params.softcap);
}

// Sets where row `row` of the item's tile goes. One thread for each row calls this.
template <class Traits>
BROADHEAD_DEVICE void set_row(const DecodeParams& params, const Workspace& workspace, const WorkItem& item, int row,
                              DecodeRow& target) {
  const RowPlace place =
      place_row({tile_rows<Traits::kTileM>(params, item.seqlen, item.batch, item.m_block), item.head}, row);
  target = {nullptr, nullptr, -1};
  if (!place.live) return;
  target.head = place.head;
  if (item.is_split) {
    const long long slot = workspace.slot(params, item, blockIdx.x);
    target.out = workspace.out_row(params, slot, row);
    target.lse = workspace.lse_row(slot, row);
  } else {
    target.out = output_row<typename Traits::Element>(params, item.seqlen, place);  // any 16-bit dtype
    target.lse = lse_address(params, item.seqlen, place);
  }
}

}  // namespace broadhead::decode
