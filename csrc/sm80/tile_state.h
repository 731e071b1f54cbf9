// What one block works on: sequence, rows, mask and where K/V lie. Computed by one thread, kept in shared memory.
#pragma once

#include "common/attention_mask.h"
#include "common/seqlen_info.h"
#include "sm80/atoms.h"

namespace broadhead {

// Rows of a tile when `rows_per_token` query heads of one KV head are packed: row = token * rows_per_token + head.
struct RowMap {
  int first_row;       // of the tile within the sequence and (KV) head
  int rows_per_token;  // 1: not packed
  int num_rows;        // live rows of the sequence

  BROADHEAD_DEVICE int token(int row) const {
    return rows_per_token == 1 ? first_row + row : (first_row + row) / rows_per_token;
  }
};

// Where the rows of one (sequence, head) tile go.
struct OutputRows {
  RowMap rows;
  int head;  // KV head when packed, else query head

  BROADHEAD_DEVICE int query_head(int row) const {
    return rows.rows_per_token == 1 ? head : head * rows.rows_per_token + (rows.first_row + row) % rows.rows_per_token;
  }
  BROADHEAD_DEVICE bool live(int row) const { return rows.first_row + row < rows.num_rows; }
};

// The K/V of one sequence and head. It lives in shared memory: registers are what these kernels are short of. Rows that
// no query of the tile sees are zero-filled, never read: they may be unwritten cache slots, freed pages or another
// sequence.
template <class Element>
struct KvSource {
  const Element* k;  // first key (dense, packed) or first page (paged) of the head
  const Element* v;
  long long k_row_stride;
  long long v_row_stride;
  const std::int32_t* table;  // page-table row of the sequence; null: not paged
  int leftpad;                // paged: logical row of key 0
  KeyInterval live;
  int prefix_len;
  int head_dim;
  int head_dim_v;

  BROADHEAD_DEVICE bool is_live(int key) const { return (key >= live.begin && key < live.end) || key < prefix_len; }
};

constexpr float kLog2e = 1.4426950408889634f;

// The softmax works on exp2(S * scale_log2 - max): a scale <= 0 would turn the maximum into a minimum, and softcap is
// not linear, so in both cases S is transformed first (`transform`) and the remaining scale is 1.
struct ScoreScale {
  float scale_log2;
  float scale;       // of the remaining S, natural units
  float softcap;
  float inner;       // softcap: scale / softcap; else scale
  bool transform;

  BROADHEAD_DEVICE void set(float softmax_scale, float softcap_) {
    softcap = softcap_;
    transform = softcap > 0.f || !(softmax_scale > 0.f);
    scale = transform ? 1.f : softmax_scale;
    scale_log2 = scale * kLog2e;
    inner = softcap > 0.f ? softmax_scale / softcap : softmax_scale;
  }

  // tanh(x) = 1 - 2 / (exp(2x) + 1); two special-function instructions, absolute error near 1e-6.
  BROADHEAD_DEVICE float apply(float s) const {
    const float x = s * inner;
    if (softcap <= 0.f) return x;
    return softcap * (1.f - __fdividef(2.f, exp2_approx(2.f * kLog2e * x) + 1.f));
  }
};

template <class Element>
struct TileState {
  SeqlenInfo seqlen;
  OutputRows output;
  AttentionMask mask;
  KeyInterval unmasked;  // keys that every row of the tile sees
  BlockRange range;      // key blocks of this block's share
  BlockRange whole;      // key blocks that are copied without any check: all keys live, all columns there, not paged
  int splits;            // shares of this sequence
  KvSource<Element> source;
  ScoreScale scale;
};

// `head`: KV head when GQA is packed, else query head. A tile without live rows or a share that the sequence does not
// use gets splits = 0. `head_dim` is the kernel's bucket.
template <class Element>
BROADHEAD_DEVICE void make_tile_state(TileState<Element>& state, const AttnParams& params, int m_block, int head,
                                      int batch, int split, int splits, int tile_m, int tile_n, int head_dim) {
  const int group = params.num_heads_q / params.num_heads_kv;
  const int rows_per_token = params.pack_gqa ? group : 1;
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  const OutputRows output{{m_block * tile_m, rows_per_token, seqlen.seqlen_q * rows_per_token}, head};
  state.seqlen = seqlen;
  state.output = output;
  state.splits = output.rows.first_row < output.rows.num_rows && split < splits ? splits : 0;

  const int q_first = output.rows.token(0);
  const int q_last = min_int(output.rows.token(tile_m - 1), seqlen.seqlen_q - 1);
  const AttentionMask mask{
      seqlen.seqlen_q,        seqlen.seqlen_k,
      params.window_left,     params.window_right,
      params.attention_chunk, params.prefix_lens ? min_int(params.prefix_lens[batch], seqlen.seqlen_k) : 0};
  state.mask = mask;
  state.unmasked = mask.unmasked_interval(q_first, q_last);
  state.range = split_range(block_range(mask, q_first, q_last, tile_n), split, splits);

  const int kv_head = params.pack_gqa ? head : head / group;
  const bool paged = params.page_table != nullptr;
  KvSource<Element>& source = state.source;
  source.k = static_cast<const Element*>(params.k) + kv_head * params.k_strides.head;
  source.v = static_cast<const Element*>(params.v) + kv_head * params.v_strides.head;
  source.table = nullptr;
  source.leftpad = static_cast<int>(seqlen.row_k);
  if (paged) {
    source.table = params.page_table + seqlen.batch_k * params.page_table_batch_stride;
  } else {
    source.k += seqlen.batch_k * params.k_strides.batch + seqlen.row_k * params.k_strides.row;
    source.v += seqlen.batch_k * params.v_strides.batch + seqlen.row_k * params.v_strides.row;
  }
  source.k_row_stride = params.k_strides.row;
  source.v_row_stride = params.v_strides.row;
  source.live = mask.tile_interval(q_first, q_last);
  source.prefix_len = mask.prefix_len;
  source.head_dim = params.head_dim;
  source.head_dim_v = params.head_dim_v;

  state.scale.set(params.softmax_scale, params.softcap);

  state.whole = {0, 0};
  if (!paged && params.head_dim == head_dim && params.head_dim_v == head_dim) {
    const KeyInterval live{source.prefix_len > 0 && source.live.begin <= source.prefix_len ? 0 : source.live.begin,
                           max_int(source.live.end, source.prefix_len)};
    state.whole = {ceil_div(live.begin, tile_n), live.end / tile_n};
  }
}

}  // namespace broadhead
