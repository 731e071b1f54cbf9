// The tile that a CTA works on: sequence, rows, mask and where K and V lie. One thread computes it; it is kept in
// shared memory.
#pragma once

#include "common/attention_mask.h"
#include "common/device.h"
#include "common/kv_source.h"
#include "common/plain_call.h"
#include "common/rows.h"
#include "common/scheduler_metadata.h"
#include "common/score.h"
#include "common/seqlen_info.h"
#include "common/tile_scheduler.h"

namespace broadhead {

template <class Element>
struct TileState {
  SeqlenInfo seqlen;
  OutputRows output;
  AttentionMask mask;
  KeyInterval unmasked;  // keys that every row of the tile sees
  BlockRange range;      // n_blocks of this split, as the tile counts them
  BlockGap gap;
  BlockRange whole;  // n_blocks that are copied without any check: all keys live, all columns there, not paged
  int splits;        // splits of this sequence
  KvSource<Element> source;
  ScoreScale scale;

  // The first key of n_block `block`, of `keys` keys.
  BROADHEAD_DEVICE int first_key(int block, int keys) const { return gap.place(block) * keys; }
};

// What kernels with Traits ask of a tile, of which the compiler knows more in those for plain calls.

// The first key of n_block `block`.
template <class Traits, class State>
BROADHEAD_DEVICE int first_key_of(const State& state, int block) {
  return Traits::kPlainCall ? block * Traits::kTileN : state.first_key(block, Traits::kTileN);
}

// Whether all of keys [key, key + count) are live.
template <class Traits>
BROADHEAD_DEVICE bool all_live(const LiveKeys& live, int key, int count) {
  if constexpr (Traits::kPlainCall) return key >= live.interval.begin && key + count <= live.interval.end;
  return live.all(key, count);
}

// Whether some query of the tile sees the key.
template <class Traits>
BROADHEAD_DEVICE bool is_live(const LiveKeys& live, int key) {
  return Traits::kPlainCall ? live.in_interval(key) : live.contains(key);
}

// The tile shape of a kernel.
struct TileShape {
  int rows;      // query rows that a tile holds
  int keys;      // keys of an n_block
  int head_dim;  // the kernel's buckets
  int head_dim_v;
  int cluster;        // how many neighbouring tiles visit the same n_blocks together
  bool plain;         // the call is plain (common/plain_call.h); a constant, like the others
  bool pages;         // keys may lie in pages
  bool splits;        // CTAs may share the keys of a tile
  bool whole_blocks;  // n_blocks are brought whole, also what no query of the tile sees
  bool fills;         // and of dense keys V is zeros behind the end
};

// Reads everything that another stream could change and that warps must agree on, once for each tile: they wait for
// each other. (Ranges and trees are read for each n_block again: they change results alone.) The steps below replace
// the values in place.
struct TileLengths {
  SeqlenInfo seqlen;
  int prefix_len;
  int splits;
};

BROADHEAD_DEVICE TileLengths read_lengths(const AttnParams& params, int batch) {
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  return {seqlen, sequence_prefix(params, batch, seqlen.seqlen_k), sequence_splits(params, batch)};
}

template <class Element>
BROADHEAD_DEVICE void set_lengths(TileState<Element>& state, const TileLengths& lengths) {
  state.seqlen = lengths.seqlen;
  state.mask.prefix_len = lengths.prefix_len;
  state.splits = lengths.splits;
}

// A tile without live rows, or a split that the sequence does not use, gets splits = 0. In a cluster both tiles of a
// pair agree on this, and a tile past the sequence's end just has no live row.
template <class Element>
BROADHEAD_DEVICE void set_tile_rows(TileState<Element>& state, const AttnParams& params, const WorkTile& tile,
                                    int split, const TileShape& shape) {
  const Divisor& rows_per_token = params.rows_per_token;
  const int num_rows = state.seqlen.seqlen_q * rows_per_token;
  const int first_row = tile.m_block * shape.rows;
  state.output = {{first_row, rows_per_token, min_int(first_row + shape.rows, num_rows)}, tile.head};
  const int splits = state.splits;
  const int cluster_row = tile.m_block / shape.cluster * shape.cluster * shape.rows;
  state.splits = cluster_row < num_rows && split < splits ? splits : 0;
}

// Sets what queries q_first..q_last of a tile see by masks that are given as values.
template <class Element>
BROADHEAD_DEVICE void set_tile_given(TileState<Element>& state, const SequenceMask& sequence, int q_first, int q_last) {
  AttentionMask& mask = state.mask;
  mask.give(sequence);
  compile_barrier();
  const KeyInterval given = given_interval(mask, sequence.extents, q_first, q_last);
  narrow_given(mask, given);
  state.source.live.given = given;
  if (mask.kind != Given::kNone) state.source.live.extents = sequence.extents.of_keys;
  compile_barrier();
}

// Sets the mask and the n_blocks, which all tiles of a cluster share.
template <class Element>
BROADHEAD_DEVICE void set_tile_keys(TileState<Element>& state, const AttnParams& params, const WorkTile& tile,
                                    int split, const TileShape& shape) {
  AttentionMask& mask = state.mask;
  mask = {state.seqlen.seqlen_q, state.seqlen.seqlen_k, params.mask_rule, mask.prefix_len};
  state.source.live.given = {0, 0};
  state.source.live.extents = nullptr;
  state.gap = {0, 0};
  const Divisor& rows_per_token = params.rows_per_token;
  const int cluster_row = tile.m_block / shape.cluster * shape.cluster * shape.rows;
  const RowMap cluster_rows{cluster_row, rows_per_token, 0};
  const int q_first = cluster_rows.token(0);
  const int q_last = min_int(cluster_rows.token(shape.rows * shape.cluster - 1), state.seqlen.seqlen_q - 1);
  if (gives_masks(params)) set_tile_given(state, params.sequence_masks[tile.batch], q_first, q_last);
  const KeyInterval placed = mask.tile_interval(q_first, q_last);
  state.source.live.interval = placed;
  compile_barrier();
  BlockRange range = blocks_of(hull(placed, {0, mask.prefix_len}), shape.keys);
  if (gives_masks(params)) range = join_ranges(range, blocks_of(state.source.live.given, shape.keys), state.gap);
  state.range = split_range(range, split, max_int(state.splits, 1));
  compile_barrier();
  // A tile past the sequence's end has such keys, too: its rows are never written.
  const RowMap& rows = state.output.rows;
  state.unmasked = mask.unmasked_interval(rows.token(0), min_int(rows.token(shape.rows - 1), q_last));
}

template <class Element>
BROADHEAD_DEVICE void set_tile_scale(TileState<Element>& state, const AttnParams& params, int batch, int kv_head) {
  if constexpr (sizeof(Element) == 1) {
    state.scale.set(params.softmax_scale * descale(params.q_descale, params.q_descale_strides, batch, kv_head) *
                        descale(params.k_descale, params.k_descale_strides, batch, kv_head),
                    params.softcap);
    state.scale.v_factor = descale(params.v_descale, params.v_descale_strides, batch, kv_head);
  } else {
    state.scale.set(params.softmax_scale, params.softcap);
  }
}

// Where K and V lie.
template <class Element>
BROADHEAD_DEVICE void set_tile_source(TileState<Element>& state, const AttnParams& params, const WorkTile& tile,
                                      const TileShape& shape) {
  const int kv_head = kv_head_of(params, tile.head);
  const bool paged = params.page_table != nullptr;
  const std::int64_t row_k = state.seqlen.row_k;
  const std::int64_t batch_k = state.seqlen.batch_k;
  KvSource<Element>& source = state.source;
  source.leftpad = static_cast<int>(row_k);
  source.table = paged ? params.page_table + batch_k * params.page_table_batch_stride : nullptr;
  source.k = static_cast<const Element*>(params.k) + kv_head * params.k_strides.head +
             (paged ? 0 : batch_k * params.k_strides.batch + row_k * params.k_strides.row);
  compile_barrier();
  source.v = static_cast<const Element*>(params.v) + kv_head * params.v_strides.head +
             (paged ? 0 : batch_k * params.v_strides.batch + row_k * params.v_strides.row);
  compile_barrier();
  source.k_row_stride = params.k_strides.row;
  source.v_row_stride = params.v_strides.row;
  source.live.prefix_len = state.mask.prefix_len;
  source.head_dim = params.head_dim;
  source.head_dim_v = params.head_dim_v;
  set_tile_scale(state, params, tile.batch, kv_head);
  state.whole = {0, 0};
  if (!paged && params.head_dim == shape.head_dim && params.head_dim_v == shape.head_dim_v && state.gap.blocks == 0) {
    const KeyInterval keys = source.live.interval;
    const int prefix_len = source.live.prefix_len;
    const KeyInterval live{prefix_len > 0 && keys.begin <= prefix_len ? 0 : keys.begin, max_int(keys.end, prefix_len)};
    state.whole = {ceil_div(live.begin, shape.keys), live.end / shape.keys};
  }
}

// The keys of a plain call whose V needs no clearing where n_blocks are brought whole: what some query of the sequence
// sees is there for all its tiles, and zeros are behind dense keys.
// PERF(H200, 775 keys, head_dim 128): the clearing took a tenth of a call. It waits for V and for all warpgroups.
BROADHEAD_DEVICE KeyInterval whole_block_keys(const AttnParams& params, const AttentionMask& mask,
                                              const TileShape& shape) {
  KeyInterval keys = mask.tile_interval(0, mask.seqlen_q - 1);
  if (shape.fills && has_dense_keys(params) && keys.end == mask.seqlen_k) keys.end = round_up(keys.end, shape.keys);
  return keys;
}

// All of it for a plain call: what is worked out stays in registers, and each field is written once.
template <class Element>
BROADHEAD_DEVICE void make_plain_state(TileState<Element>& state, const AttnParams& params, const WorkTile& tile,
                                       const TileLengths& lengths, int split, const TileShape& shape) {
  const SeqlenInfo& seqlen = lengths.seqlen;
  const bool paged = shape.pages && params.page_table != nullptr;
  const Divisor& rows_per_token = params.rows_per_token;
  const int num_rows = seqlen.seqlen_q * rows_per_token;
  const int first_row = tile.m_block * shape.rows;
  const int cluster_row = tile.m_block / shape.cluster * shape.cluster * shape.rows;
  const int splits = shape.splits ? lengths.splits : 1;
  state.splits = cluster_row < num_rows && split < splits ? splits : 0;
  state.seqlen = seqlen;
  state.gap = {0, 0};
  const RowMap rows{first_row, rows_per_token, min_int(first_row + shape.rows, num_rows)};
  state.output = {rows, tile.head};

  const AttentionMask mask = plain_mask(seqlen.seqlen_q, seqlen.seqlen_k, params.mask_rule);
  const RowMap cluster_rows{cluster_row, rows_per_token, 0};
  const int q_last = min_int(cluster_rows.token(shape.rows * shape.cluster - 1), seqlen.seqlen_q - 1);
  const KeyInterval placed = mask.tile_interval(cluster_rows.token(0), q_last);
  state.mask = mask;
  state.range = blocks_of(placed, shape.keys);
  if (shape.splits) state.range = split_range(state.range, split, max_int(splits, 1));
  state.unmasked = mask.unmasked_interval(rows.token(0), min_int(rows.token(shape.rows - 1), q_last));

  const int kv_head = kv_head_of(params, tile.head);
  const std::int64_t row_k = seqlen.row_k, batch_k = seqlen.batch_k;
  KvSource<Element>& source = state.source;
  source.leftpad = static_cast<int>(row_k);
  source.table = paged ? params.page_table + batch_k * params.page_table_batch_stride : nullptr;
  source.k = static_cast<const Element*>(params.k) + kv_head * params.k_strides.head +
             (paged ? 0 : batch_k * params.k_strides.batch + row_k * params.k_strides.row);
  source.v = static_cast<const Element*>(params.v) + kv_head * params.v_strides.head +
             (paged ? 0 : batch_k * params.v_strides.batch + row_k * params.v_strides.row);
  source.k_row_stride = params.k_strides.row;
  source.v_row_stride = params.v_strides.row;
  source.live = LiveKeys(placed, 0);
  source.head_dim = params.head_dim;
  source.head_dim_v = params.head_dim_v;
  const bool whole = !paged && params.head_dim == shape.head_dim && params.head_dim_v == shape.head_dim_v;
  state.whole = whole ? BlockRange{ceil_div(placed.begin, shape.keys), placed.end / shape.keys} : BlockRange{0, 0};
  set_tile_scale(state, params, tile.batch, kv_head);
  if (shape.whole_blocks) {
    compile_barrier();
    source.live.interval = whole_block_keys(params, plain_mask(state), shape);
  }
}

// The warps that make tile states have few registers: barriers keep the steps apart, and for the same reason each step
// takes what it needs from `state` again.
template <class Element>
BROADHEAD_DEVICE void make_tile_state(TileState<Element>& state, const AttnParams& params, const WorkTile& tile,
                                      const TileLengths& lengths, int split, const TileShape& shape) {
  if (shape.plain) return make_plain_state(state, params, tile, lengths, split, shape);
  set_lengths(state, lengths);
  set_tile_rows(state, params, tile, split, shape);
  compile_barrier();
  set_tile_keys(state, params, tile, split, shape);
  compile_barrier();
  set_tile_source(state, params, tile, shape);
}

}  // namespace broadhead
