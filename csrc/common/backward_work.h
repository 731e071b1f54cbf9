// What a CTA of a backward kernel works on: a tile of keys or of queries, and the tiles of the other side that it
// meets.
//
// "Rows" are those of the side that is kept, "columns" those of the side that streams by.
#pragma once

#include "common/attention_mask.h"
#include "common/kv_source.h"
#include "common/math.h"
#include "common/score.h"
#include "common/seqlen_info.h"
#include "common/tile_scheduler.h"
#include "host/params.h"

namespace broadhead {

enum class Side { kQueries, kKeys };

// A range of keys or of queries.
struct Columns {
  int begin;
  int end;  // exclusive
};

struct BackwardWork {
  SeqlenInfo seqlen;
  AttentionMask mask;
  ScoreScale scale;
  int batch;
  int head;     // query head, or KV head where keys are kept
  int kv_head;  // that it belongs to, or is
  int first_row;
  int end_row;       // the sequence's rows of this side
  BlockRange range;  // tiles of columns that some row meets
  int first_head;    // query heads [first_head, first_head + heads) stream by, one after the other
  int heads;
  LiveKeys live;  // columns that some row meets, keys or queries. The others may be NaN, and become zeros
  Columns whole;  // columns that every row meets
  MaskExtents extents;
  QueryInterval given_queries;  // keys: queries that see some of them by their ranges lie within

  // Whether all rows of the tile meet all `cols` columns from `col0` on. Keys: queries that do not exist count as met.
  template <Side kSide>
  BROADHEAD_HOST_DEVICE bool is_whole(int col0, int cols) const {
    const int end = kSide == Side::kKeys ? min_int(col0 + cols, seqlen.seqlen_q) : col0 + cols;
    return col0 >= whole.begin && end <= whole.end;
  }
};

// Whether queries [first_query, first_query + count) may see a key of the tile by their ranges.
BROADHEAD_HOST_DEVICE bool meets_given(const BackwardWork& work, int first_query, int count) {
  return first_query < work.given_queries.end && first_query + count > work.given_queries.begin;
}

BROADHEAD_HOST_DEVICE bool has_steps(const BackwardWork& work) { return work.range.begin < work.range.end; }

// Calls `step(query head, tile of columns)` for all that stream by, in their order.
template <class Step>
BROADHEAD_DEVICE void for_each_step(const BackwardWork& work, const Step& step) {
  for (int head = work.first_head; head < work.first_head + work.heads; ++head) {
    for (int tile = work.range.begin; tile < work.range.end; ++tile) step(head, tile);
  }
}

// `tile`: of `rows` keys. Tiles of columns hold `cols` queries.
BROADHEAD_DEVICE void set_key_tile(BackwardWork& work, int tile, int rows, int cols) {
  const AttentionMask& mask = work.mask;
  work.first_row = tile * rows;
  work.end_row = mask.seqlen_k;
  const int last_row = min_int(work.first_row + rows, mask.seqlen_k) - 1;
  const QueryInterval seen = mask.query_interval(work.first_row, last_row);
  const QueryInterval whole = mask.unmasked_queries(work.first_row, last_row);
  const int end = min_int(seen.end, mask.seqlen_q);
  work.given_queries = given_queries(mask, work.extents, work.first_row, last_row);
  const KeyInterval live = hull({seen.begin, end}, {work.given_queries.begin, work.given_queries.end});
  work.live = {live, 0};
  work.whole = {whole.begin, whole.end};
  work.range = {live.begin / cols, live.begin < live.end ? ceil_div(live.end, cols) : 0};
}

// `tile`: of `rows` queries. Tiles of columns hold `cols` keys.
BROADHEAD_DEVICE void set_query_tile(BackwardWork& work, int tile, int rows, int cols) {
  AttentionMask& mask = work.mask;
  work.first_row = tile * rows;
  work.end_row = mask.seqlen_q;
  const int last_row = min_int(work.first_row + rows, mask.seqlen_q) - 1;
  const KeyInterval whole = mask.unmasked_interval(work.first_row, last_row);
  const KeyInterval given = given_interval(mask, work.extents, work.first_row, last_row);
  narrow_given(mask, given);
  work.live = {mask.tile_interval(work.first_row, last_row), mask.prefix_len, given, work.extents.of_keys};
  work.whole = {whole.begin, whole.end};
  work.range = block_range(mask, work.first_row, last_row, cols, given);
}

// Work `index` of the grid. Heads come in sections whose columns share the L2 (common/tile_scheduler.h). Within one the
// tiles that may be the longest come first: the last queries, the first keys.
template <Side kSide>
BROADHEAD_DEVICE void set_backward_work(BackwardWork& work, const AttnBwdParams& params, int index, int tiles,
                                        int heads_per_section, int rows, int cols) {
  constexpr bool kKeys = kSide == Side::kKeys;
  const int group = params.heads_per_kv;
  const int heads = kKeys ? params.num_heads_kv : params.num_heads_q;
  const WorkTile at = work_tile(index, tiles, heads, params.batch, heads_per_section);
  const SeqlenInfo seqlen = make_seqlen_info(params, at.batch);
  work.seqlen = seqlen;
  const int prefix_len = sequence_prefix(params, at.batch, seqlen.seqlen_k);
  work.mask = {seqlen.seqlen_q, seqlen.seqlen_k, params.mask_rule, prefix_len};
  work.extents = {};
  if (gives_masks(params)) {
    work.mask.give(params.sequence_masks[at.batch]);
    work.extents = params.sequence_masks[at.batch].extents;
  }
  work.scale.set(params.softmax_scale, params.softcap);
  work.batch = at.batch;
  work.head = at.head;
  work.kv_head = kKeys ? at.head : kv_head_of(params, at.head);
  work.first_head = kKeys ? at.head * group : at.head;
  work.heads = kKeys ? group : 1;
  if constexpr (kKeys) {
    set_key_tile(work, tiles - 1 - at.m_block, rows, cols);
  } else {
    set_query_tile(work, at.m_block, rows, cols);
  }
}

// What a backward kernel reads of a query.
struct QueryStats {
  float lse;    // in units of log2(e); +inf: its P is 0, whatever q, out and dout hold there
  float delta;  // D
};

// As they lie in memory: LSE in units of e.
struct StoredStats {
  float lse;
  float delta;

  // A query with an LSE of -inf has no gradient.
  BROADHEAD_DEVICE QueryStats stats() const {
    if (lse == -INFINITY) return {INFINITY, 0.f};
    return {lse * kLog2e, delta};
  }
};

// Those of a query that exists. Both loads are issued, whatever the first one brings: their latency is that of one.
BROADHEAD_DEVICE StoredStats read_query_stats(const AttnBwdParams& params, const SeqlenInfo& seqlen, int head,
                                              int query) {
  const std::int64_t row = seqlen.row_q + query;
  const std::int64_t total_row = seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + row;
  return {params.softmax_lse[seqlen.batch_q * params.lse_batch_stride + head * params.lse_head_stride + row],
          params.delta[head * params.total_q + total_row]};
}

// A query behind the end of the sequence, or with an LSE of -inf, has no gradient.
BROADHEAD_DEVICE QueryStats load_query_stats(const AttnBwdParams& params, const SeqlenInfo& seqlen, int head,
                                             int query) {
  if (query >= seqlen.seqlen_q) return {INFINITY, 0.f};
  return read_query_stats(params, seqlen, head, query).stats();
}

}  // namespace broadhead
