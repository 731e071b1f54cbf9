// Where the parts of a tile leave their results until the combine merges them.
#pragma once

#include "common/macros.h"
#include "decode/line.h"

namespace broadhead::decode {

// Balanced: block g has two slots, 2 g for a tile that began before its interval and 2 g + 1 for the first part of a
// tile that goes on behind it. In cells: a slot for each cell of each tile, tiles in dense order.
struct BlockParts {
  SeqlenInfo seqlen;  // of the split tile whose first part block g computes
  int batch;          // -1: there is none
  int head;
  int m_block;
  int passes;  // 1: a tile began before the interval of block g and goes on behind it
};

struct Workspace {
  BlockParts* blocks;  // [num_blocks], balanced only
  int num_blocks;      // of the decode grid
  float* out;        // [slots, slot_rows, head_dim_v]
  float* lse;        // [slots, slot_rows], natural log
  int slot_rows;     // query rows of a tile that any call of these shapes can have
  int m_blocks;      // cells: of the longest sequence
  int cells;         // cells: of the longest tile

  BROADHEAD_HOST_DEVICE long long slot(const DecodeParams& params, const LineItem& item, int block) const {
    if (params.cell_blocks == 0) return 2ll * block + (item.part == 0 ? 1 : 0);
    const long long tile =
        (static_cast<long long>(item.batch) * params.heads_in_grid + item.head) * m_blocks + item.m_block;
    return tile * cells + item.part;
  }
  BROADHEAD_HOST_DEVICE float* out_row(const DecodeParams& params, long long slot, int row) const {
    return out + (slot * slot_rows + row) * params.head_dim_v;
  }
  BROADHEAD_HOST_DEVICE float* lse_row(long long slot, int row) const { return lse + slot * slot_rows + row; }
};

}  // namespace broadhead::decode
