// Which query rows a tile of the line holds.
#pragma once

#include "common/rows.h"
#include "decode/line.h"

namespace broadhead::decode {

// Those that the sequence has.
template <int kTileM>
BROADHEAD_DEVICE RowMap tile_rows(const DecodeParams& params, const SeqlenInfo& seqlen, int batch, int m_block) {
  const int first_row = m_block * kTileM;
  return {first_row, params.rows_per_token, min_int(first_row + kTileM, sequence_rows(params, seqlen, batch))};
}

}  // namespace broadhead::decode
