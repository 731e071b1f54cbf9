// The workspace: where the splits of a tile leave their partial results until the combine kernel merges them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/macros.h"
#include "decode/stream_k.h"

namespace broadhead::decode {

// Slots of partial results:
// - Stream-K: CTA g has slot 2 g for a tile that began before its interval, and slot 2 g + 1 for the first split of a
//   tile that goes on behind its interval. With shared keys each tile has one more slot, behind those of all CTAs,
//   which it takes when it is a single split.
// - Fixed splits: each split of each tile has a slot.
// Tiles in dense order are ordered by sequence, head, m_block.
//
// CTA g writes this note about the splits that it computes.
struct CtaSplits {
  SeqlenInfo seqlen;  // of the split tile whose first split CTA g computes
  int batch;          // -1: there is none
  int head;
  int m_block;
  int passes;  // 1: a tile began before the interval of CTA g and goes on behind it
};

// With shared keys: the CTAs that compute the first and the last split of a tile. Each CTA between them computes one.
struct TileSplits {
  int first;
  int last;
};

struct Workspace {
  CtaSplits* ctas;      // [num_ctas], stream-K without shared keys only
  TileSplits* tiles;    // [tiles], with shared keys only
  int num_ctas;         // of the decode grid
  float* out;           // [slots, slot_rows, head_dim_v]
  float* lse;           // [slots, slot_rows], natural log
  int slot_rows;        // query rows of a tile that any call of these shapes can have
  int m_blocks;         // of the longest sequence
  int shared_m_blocks;  // of all query tokens, over the shared keys
  int fixed_splits;     // fixed splits: how many the longest tile has

  // The index of a tile in dense order.
  BROADHEAD_HOST_DEVICE long long tile(const DecodeParams& params, int batch, int head, int m_block) const {
    const long long before = static_cast<long long>(batch) * params.heads_in_grid * m_blocks;
    return before + head * (is_shared(params, batch) ? shared_m_blocks : m_blocks) + m_block;
  }
  BROADHEAD_HOST_DEVICE long long tile(const DecodeParams& params, const WorkItem& item) const {
    return tile(params, item.batch, item.head, item.m_block);
  }
  // The slot of a tile that is a single split in a call with shared keys.
  BROADHEAD_HOST_DEVICE long long whole_slot(long long tile) const { return 2ll * num_ctas + tile; }

  BROADHEAD_HOST_DEVICE long long slot(const DecodeParams& params, const WorkItem& item, int cta) const {
    if (params.cell_blocks > 0) return tile(params, item) * fixed_splits + item.split;
    if (item.split == 0 && !item.goes_on) return whole_slot(tile(params, item));
    return 2ll * cta + (item.split == 0 ? 1 : 0);
  }
  BROADHEAD_HOST_DEVICE float* out_row(const DecodeParams& params, long long slot, int row) const {
    return out + (slot * slot_rows + row) * params.head_dim_v;
  }
  BROADHEAD_HOST_DEVICE float* lse_row(long long slot, int row) const { return lse + slot * slot_rows + row; }
};

// AttnParams::cell_blocks, the size of fixed splits, is given in units of this many keys.
constexpr int kSplitUnitTokens = 64;

// The workspace of a call, and the one place that computes its size. The size follows from what the call declares,
// never from a length on the device: rows and tiles from seqlen_q, fixed splits from the capacity of keys.
struct WorkspacePlan {
  Workspace shape{};        // without addresses
  long long rows = 0;       // of a head of the grid, in the longest sequence and over the shared keys
  long long tiles = 0;      // of the sequences
  long long all_tiles = 0;  // with those over the shared keys
  long long merged = 0;     // tiles, or CTAs, whose splits the combine looks for
  int tile_rows = 0;        // query rows of a tile of a sequence that any call of these shapes can have
  long long slots = 0;
  long long head_bytes = 0;  // of TileSplits or CtaSplits, which come first
  std::int64_t bytes = 0;

  // `shape` with its addresses in AttnParams::out_partial.
  Workspace place(const AttnParams& params) const {
    Workspace workspace = shape;
    char* base = reinterpret_cast<char*>(params.out_partial);
    if (bytes == 0 || base == nullptr) return workspace;
    if (params.shared_seqlen_k > 0) {
      workspace.tiles = reinterpret_cast<TileSplits*>(base);
    } else if (head_bytes > 0) {
      workspace.ctas = reinterpret_cast<CtaSplits*>(base);
    }
    workspace.out = reinterpret_cast<float*>(base + head_bytes);
    workspace.lse = workspace.out + slots * workspace.slot_rows * params.head_dim_v;
    return workspace;
  }
};

// For tiles of `tile_m` rows and a grid of `ctas`. Stream-K needs two slots for each CTA, however many tiles there are:
// a CTA computes at most the end of one split tile and the begin of another. With shared keys every tile has one more
// slot, for when it is a single split.
inline WorkspacePlan plan_workspace(const AttnParams& params, int tile_m, int ctas) {
  const long long rows_per_token = params.rows_per_token;
  const long long heads = params.heads_in_grid;
  const auto tiles_of = [&](long long rows) { return (rows + tile_m - 1) / tile_m; };
  WorkspacePlan plan;
  plan.rows = params.seqlen_q * rows_per_token;
  plan.shape.m_blocks = static_cast<int>(tiles_of(plan.rows));
  plan.shape.num_ctas = ctas;
  plan.tiles = plan.all_tiles = tiles_of(plan.rows) * heads * params.batch;
  plan.tile_rows = plan.shape.slot_rows = static_cast<int>(std::min<long long>(tile_m, plan.rows));
  if (params.shared_seqlen_k > 0) {
    const long long shared_rows = params.total_q * rows_per_token;
    plan.rows = std::max(plan.rows, shared_rows);
    plan.shape.shared_m_blocks = static_cast<int>(tiles_of(shared_rows));
    plan.shape.slot_rows = static_cast<int>(std::min<long long>(tile_m, plan.rows));
    plan.all_tiles += tiles_of(shared_rows) * heads;
    plan.merged = plan.tiles;
    plan.slots = 2ll * ctas + plan.all_tiles;
    plan.head_bytes = (plan.all_tiles + 1) / 2 * 2 * static_cast<long long>(sizeof(TileSplits));
  } else if (params.cell_blocks > 0) {
    const long long split_tokens = static_cast<long long>(params.cell_blocks) * kSplitUnitTokens;
    plan.shape.fixed_splits = static_cast<int>((params.seqlen_k + split_tokens - 1) / split_tokens);
    if (plan.shape.fixed_splits > 1) {
      plan.merged = plan.tiles;
      plan.slots = plan.tiles * plan.shape.fixed_splits;
    }
  } else if (params.num_splits == 1) {
    plan.shape.fixed_splits = 1;
  } else {
    plan.merged = ctas;
    plan.slots = 2ll * ctas;
    plan.head_bytes = ctas * static_cast<long long>(sizeof(CtaSplits));
  }
  plan.bytes = plan.head_bytes + 4 * plan.slots * plan.shape.slot_rows * (params.head_dim_v + 1ll);
  return plan;
}

// Tells the combine that CTA `cta` of the decode grid computes a split of the item's tile; `splits` is that CTA's note.
// One thread of the CTA calls this.
BROADHEAD_HOST_DEVICE void note_split(const DecodeParams& params, const Workspace& workspace, const WorkItem& item,
                                      int cta, CtaSplits& splits) {
  if (workspace.tiles != nullptr) {
    TileSplits& tile = workspace.tiles[workspace.tile(params, item)];
    if (item.split == 0) tile.first = cta;
    if (!item.goes_on) tile.last = cta;
  } else if (item.goes_on) {
    if (item.split == 0) {
      splits = {item.seqlen, item.batch, item.head, item.m_block, splits.passes};
    } else {
      splits.passes = 1;
    }
  }
}

// Where the splits of a tile left their results of one row.
struct RowSplits {
  int splits = 0;
  int row = 0;  // in the tile
  // The splits lie in slots first, rest, rest + step, ...
  int first = 0;
  int rest = 1;
  int step = 0;

  BROADHEAD_HOST_DEVICE int slot(int split) const { return split == 0 ? first : rest + (split - 1) * step; }
};

// The splits of the tile whose first split CTA `first` of the decode grid computes, and which goes on in the CTAs
// behind it. Notes contradict each other when the lengths were changed during the run, so no more CTAs are counted than
// exist.
BROADHEAD_HOST_DEVICE RowSplits stream_k_splits(const Workspace& workspace, int splits, int row, int first) {
  return {min_int(splits, workspace.num_ctas - first), row, 2 * first + 1, 2 * first + 2, 2};
}

// The splits of tile `tile`, an index in dense order.
BROADHEAD_HOST_DEVICE RowSplits noted_splits(const Workspace& workspace, long long tile, const TileSplits& ctas,
                                             int row) {
  // The notes of a tile may be garbage for the same reason, or when no CTA has written them.
  const int first = clamp_int(ctas.first, 0, workspace.num_ctas - 1);
  const int last = clamp_int(ctas.last, first, workspace.num_ctas - 1);
  if (first == last) return {1, row, static_cast<int>(workspace.whole_slot(tile)), 0, 0};
  return stream_k_splits(workspace, last - first + 1, row, first);
}

// The splits of row `row` of a sequence (its tokens, then the heads of a token) over the shared keys. There are none
// when the lengths of the call contradict themselves.
BROADHEAD_HOST_DEVICE RowSplits shared_splits(const DecodeParams& params, const Workspace& workspace,
                                              const SeqlenInfo& seqlen, int head, int row, int tile_m) {
  const SeqlenInfo shared = sequence_info(params, params.batch);
  const int first_token = seqlen.batch_q * params.seqlen_q + static_cast<int>(seqlen.row_q);
  const int shared_row = first_token * params.rows_per_token + row;
  if (shared_row < 0 || shared_row >= sequence_rows(params, shared, params.batch)) return {};
  const long long tile = workspace.tile(params, params.batch, head, shared_row / tile_m);
  return noted_splits(workspace, tile, workspace.tiles[tile], shared_row % tile_m);
}

}  // namespace broadhead::decode
