// Where the parts of a tile leave their results until the combine merges them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/macros.h"
#include "decode/line.h"

namespace broadhead::decode {

// Balanced: block g has two slots, 2 g for a tile that began before its interval and 2 g + 1 for the first part of a
// tile that goes on behind it; with shared keys behind those of all blocks one for each tile, which it takes when it is
// one part. In cells: a slot for each cell of each tile. Tiles in dense order: sequence, head, query tile.
struct BlockParts {
  SeqlenInfo seqlen;  // of the split tile whose first part block g computes
  int batch;          // -1: there is none
  int head;
  int m_block;
  int passes;  // 1: a tile began before the interval of block g and goes on behind it
};

// With shared keys: the blocks that compute the first and the last part of a tile. All between compute one.
struct TileParts {
  int first;
  int last;
};

struct Workspace {
  BlockParts* blocks;  // [num_blocks], balanced only, without shared keys
  TileParts* tiles;    // [tiles], with shared keys only
  int num_blocks;      // of the decode grid
  float* out;        // [slots, slot_rows, head_dim_v]
  float* lse;        // [slots, slot_rows], natural log
  int slot_rows;     // query rows of a tile that any call of these shapes can have
  int m_blocks;         // of the longest sequence
  int shared_m_blocks;  // of all query tokens, over the shared keys
  int cells;            // cells: of the longest tile

  // In dense order.
  BROADHEAD_HOST_DEVICE long long tile(const DecodeParams& params, int batch, int head, int m_block) const {
    const long long before = static_cast<long long>(batch) * params.heads_in_grid * m_blocks;
    return before + head * (is_shared(params, batch) ? shared_m_blocks : m_blocks) + m_block;
  }
  BROADHEAD_HOST_DEVICE long long tile(const DecodeParams& params, const LineItem& item) const {
    return tile(params, item.batch, item.head, item.m_block);
  }
  // The slot of a tile that is one part of a call with shared keys.
  BROADHEAD_HOST_DEVICE long long whole_slot(long long tile) const { return 2ll * num_blocks + tile; }

  BROADHEAD_HOST_DEVICE long long slot(const DecodeParams& params, const LineItem& item, int block) const {
    if (params.cell_blocks > 0) return tile(params, item) * cells + item.part;
    if (item.part == 0 && !item.goes_on) return whole_slot(tile(params, item));
    return 2ll * block + (item.part == 0 ? 1 : 0);
  }
  BROADHEAD_HOST_DEVICE float* out_row(const DecodeParams& params, long long slot, int row) const {
    return out + (slot * slot_rows + row) * params.head_dim_v;
  }
  BROADHEAD_HOST_DEVICE float* lse_row(long long slot, int row) const { return lse + slot * slot_rows + row; }
};

// Keys that AttnParams::cell_blocks counts in.
constexpr int kCellTokens = 64;

// The workspace of a call: the one place where its size is worked out. It follows from what the call declares, never
// from a length on the device: rows of a tile and tiles from seqlen_q, cells from the capacity of keys.
struct WorkspacePlan {
  Workspace shape{};         // without addresses
  long long rows = 0;        // of a head of the grid, in the longest sequence and over the shared keys
  long long tiles = 0;       // of the sequences
  long long all_tiles = 0;   // with those over the shared keys
  long long merged = 0;      // tiles, or blocks with a split tile, that the combine looks at
  int tile_rows = 0;         // query rows of a tile of a sequence that any call of these shapes can have
  long long slots = 0;
  long long head_bytes = 0;  // of TileParts or BlockParts, which come first
  std::int64_t bytes = 0;

  // `shape` with its addresses in AttnParams::out_partial.
  Workspace place(const AttnParams& params) const {
    Workspace workspace = shape;
    char* base = reinterpret_cast<char*>(params.out_partial);
    if (bytes == 0 || base == nullptr) return workspace;
    if (params.shared_seqlen_k > 0) {
      workspace.tiles = reinterpret_cast<TileParts*>(base);
    } else if (head_bytes > 0) {
      workspace.blocks = reinterpret_cast<BlockParts*>(base);
    }
    workspace.out = reinterpret_cast<float*>(base + head_bytes);
    workspace.lse = workspace.out + slots * workspace.slot_rows * params.head_dim_v;
    return workspace;
  }
};

// For tiles of `tile_m` rows and a grid of `blocks`. Without cells there are two slots for each block, however many
// tiles there are: a block holds at most the end of one tile and the begin of another as parts. With shared keys every
// tile has a slot besides, for when it is one part.
inline WorkspacePlan plan_workspace(const AttnParams& params, int tile_m, int blocks) {
  const long long rows_per_token = params.pack_gqa ? params.num_heads_q / params.num_heads_kv : 1;
  const long long heads = params.pack_gqa ? params.num_heads_kv : params.num_heads_q;
  const auto tiles_of = [&](long long rows) { return (rows + tile_m - 1) / tile_m; };
  WorkspacePlan plan;
  plan.rows = params.seqlen_q * rows_per_token;
  plan.shape.m_blocks = static_cast<int>(tiles_of(plan.rows));
  plan.shape.num_blocks = blocks;
  plan.tiles = plan.all_tiles = tiles_of(plan.rows) * heads * params.batch;
  plan.tile_rows = plan.shape.slot_rows = static_cast<int>(std::min<long long>(tile_m, plan.rows));
  if (params.shared_seqlen_k > 0) {
    const long long shared_rows = params.total_q * rows_per_token;
    plan.rows = std::max(plan.rows, shared_rows);
    plan.shape.shared_m_blocks = static_cast<int>(tiles_of(shared_rows));
    plan.shape.slot_rows = static_cast<int>(std::min<long long>(tile_m, plan.rows));
    plan.all_tiles += tiles_of(shared_rows) * heads;
    plan.merged = plan.tiles;
    plan.slots = 2ll * blocks + plan.all_tiles;
    plan.head_bytes = (plan.all_tiles + 1) / 2 * 2 * static_cast<long long>(sizeof(TileParts));
  } else if (params.cell_blocks > 0) {
    const long long cell_tokens = static_cast<long long>(params.cell_blocks) * kCellTokens;
    plan.shape.cells = static_cast<int>((params.seqlen_k + cell_tokens - 1) / cell_tokens);
    if (plan.shape.cells > 1) {
      plan.merged = plan.tiles;
      plan.slots = plan.tiles * plan.shape.cells;
    }
  } else if (params.num_splits == 1) {
    plan.shape.cells = 1;
  } else {
    plan.merged = blocks;
    plan.slots = 2ll * blocks;
    plan.head_bytes = blocks * static_cast<long long>(sizeof(BlockParts));
  }
  plan.bytes = plan.head_bytes + 4 * plan.slots * plan.shape.slot_rows * (params.head_dim_v + 1ll);
  return plan;
}

// Tells the combine that block `block` of the decode grid computes a part of the item's tile; `parts`: what the block
// says of itself. One thread.
BROADHEAD_HOST_DEVICE void note_part(const DecodeParams& params, const Workspace& workspace, const LineItem& item,
                                     int block, BlockParts& parts) {
  if (workspace.tiles != nullptr) {
    TileParts& tile = workspace.tiles[workspace.tile(params, item)];
    if (item.part == 0) tile.first = block;
    if (!item.goes_on) tile.last = block;
  } else if (item.goes_on) {
    if (item.part == 0) {
      parts = {item.seqlen, item.batch, item.head, item.m_block, parts.passes};
    } else {
      parts.passes = 1;
    }
  }
}

// Where the parts of a tile left a row.
struct RowParts {
  int parts = 0;
  int row = 0;  // in the tile
  // They lie in slots first, rest, rest + step, ...
  int first = 0;
  int rest = 1;
  int step = 0;

  BROADHEAD_HOST_DEVICE int slot(int part) const { return part == 0 ? first : rest + (part - 1) * step; }
};

// The parts of the tile whose first part block `first` of the decode grid computes, and which goes on in the blocks
// behind: as many as there are, should their notes contradict each other because the lengths were changed in the midst
// of the run.
BROADHEAD_HOST_DEVICE RowParts balanced_parts(const Workspace& workspace, int parts, int row, int first) {
  return {min_int(parts, workspace.num_blocks - first), row, 2 * first + 1, 2 * first + 2, 2};
}

// The parts of tile `tile`, in dense order.
BROADHEAD_HOST_DEVICE RowParts noted_parts(const Workspace& workspace, long long tile, const TileParts& blocks,
                                           int row) {
  // Likewise a tile that no block has noted.
  const int first = clamp_int(blocks.first, 0, workspace.num_blocks - 1);
  const int last = clamp_int(blocks.last, first, workspace.num_blocks - 1);
  if (first == last) return {1, row, static_cast<int>(workspace.whole_slot(tile)), 0, 0};
  return balanced_parts(workspace, last - first + 1, row, first);
}

// The parts of row `row` of a sequence (its tokens, then the heads of a token) over the shared keys. There are none
// when the lengths of the call contradict themselves.
BROADHEAD_HOST_DEVICE RowParts shared_parts(const DecodeParams& params, const Workspace& workspace,
                                            const SeqlenInfo& seqlen, int head, int row, int tile_m) {
  const SeqlenInfo shared = sequence_info(params, params.batch);
  const int first_token = seqlen.batch_q * params.seqlen_q + static_cast<int>(seqlen.row_q);
  const int shared_row = first_token * params.rows_per_token + row;
  if (shared_row < 0 || shared_row >= sequence_rows(params, shared, params.batch)) return {};
  const long long tile = workspace.tile(params, params.batch, head, shared_row / tile_m);
  return noted_parts(workspace, tile, workspace.tiles[tile], shared_row % tile_m);
}

}  // namespace broadhead::decode
