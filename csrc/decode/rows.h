// Which query rows of its sequence a tile holds.
#pragma once

#include "common/rows.h"
#include "decode/stream_k.h"

namespace broadhead::decode {

// The rows of the tile that the sequence has: the last tile of a sequence may have fewer than kTileM.
template <int kTileM>
BROADHEAD_DEVICE RowMap tile_rows(const DecodeParams& params, const SeqlenInfo& seqlen, int batch, int m_block) {
  const int first_row = m_block * kTileM;
  return {first_row, params.rows_per_token, min_int(first_row + kTileM, sequence_rows(params, seqlen, batch))};
}

}  // namespace broadhead::decode
