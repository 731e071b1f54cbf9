// Loads a tile of q or qv by TMA.
#pragma once

#include "common/tile_state.h"
#include "tma/copy.h"
#include "tma/tensor_maps.h"

namespace broadhead::tma {

// Where a tile's rows of q or qv lie in its map.
struct QCoordinates {
  int head;  // of the token
  int row;
  int x;
};

template <class Element>
BROADHEAD_DEVICE QCoordinates q_coordinates(const QMap& map, const TileState<Element>& state) {
  const RowMap& rows = state.output.rows;
  const int token = rows.token(0);
  return {rows.first_row - token * rows.rows_per_token, static_cast<int>(state.seqlen.row_q) + token,
          state.output.head * map.head_step + state.seqlen.batch_q * map.batch_step};
}

// Brings the tile into the L2: it comes from DRAM, and is asked for before its buffer is free. By one lane.
template <class Layout>
BROADHEAD_DEVICE void prefetch_q(const QMap& map, const QCoordinates& at) {
  for (int s = 0; s < Layout::kSubtiles; ++s)
    tma_prefetch(&map.map, s * Layout::kSubtileCols, at.head, at.row, 0, at.x);
}

// The tile's subtiles of columns [subtile0, subtile0 + subtiles), of `rows` rows.
template <class Layout, int kTileM>
BROADHEAD_DEVICE void load_q(const QMap& map, const QCoordinates& at, int rows, std::uint32_t target, Barrier& full,
                             int subtile0 = 0, int subtiles = Layout::kSubtiles) {
  full.arrive_and_expect_tx(subtiles * rows * Layout::kRowBytes);
  for (int s = 0; s < subtiles; ++s) {
    tma_load(&map.map, target + s * kTileM * Layout::kRowBytes, full, (subtile0 + s) * Layout::kSubtileCols, at.head,
             at.row, 0, at.x);
  }
}

}  // namespace broadhead::tma
