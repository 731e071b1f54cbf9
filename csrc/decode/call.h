// A call as the decode kernels get it, and its sequences: lengths, rows, mask.
#pragma once

#include "common/attention_mask.h"
#include "common/seqlen_info.h"

namespace broadhead::decode {

// A call as the decode kernels get it: what they would have to divide for is there.
struct DecodeParams : AttnParams {
  int rows_per_token;  // query rows of a token in a tile: heads of a KV head when packed
  int heads_in_grid;  // KV heads when packed
  int heads_per_kv;  // of those in the grid
  int tile_cost;  // what a tile costs besides its key blocks (Q, the merge of the warps, the output), in key blocks
  unsigned pages;  // page ids below exist; 1 when not paged
  int sees_all;  // masks need not be worked out: what runs before the first copies is cold code, and slow
  // Bytes of q and of the page tables when they are one piece, else 0: what the grid asks the L2 for before it knows
  // what it needs.
  unsigned q_bytes;
  unsigned table_bytes;
  unsigned shared_table_bytes;
  // The sequence of the shared keys, ready to be used where registers are short.
  int shared_sequences;  // 1, or 0: there are none
  int shared_tokens;  // query tokens of all sequences
  const std::int32_t* live_tokens;  // likewise on the device, nullable: packed q may be longer
};

// Whether every query of a call sees all keys of its sequence.
inline bool sees_all(const AttnParams& params) {
  const bool one_token = params.seqlen_q == 1;  // the last of its sequence
  return params.window_left < 0 && (params.window_right < 0 || one_token) && params.attention_chunk == 0 &&
         params.prefix_lens == nullptr;
}

// Sequences on the line: those of the call and, behind them, that of the shared keys.
BROADHEAD_HOST_DEVICE int sequences(const DecodeParams& params) { return params.batch + params.shared_sequences; }

// Whether sequence `batch` of the line is that of the shared keys.
BROADHEAD_HOST_DEVICE bool is_shared(const DecodeParams& params, int batch) { return batch == params.batch; }

// make_seqlen_info of a sequence of the line.
BROADHEAD_HOST_DEVICE SeqlenInfo sequence_info(const DecodeParams& params, int batch) {
  if (!is_shared(params, batch)) return make_seqlen_info(params, batch);
  int tokens = params.shared_tokens;
  // Rows of packed q behind the last sequence may hold anything.
  if (params.live_tokens != nullptr) tokens = max_int(0, min_int(tokens, *params.live_tokens));
  return {0, 0, tokens, params.shared_seqlen_k, 0, 0};
}

// Rows of one head in the grid. No more than the call declared (max_seqlen_q): the workspace has room for those.
BROADHEAD_HOST_DEVICE int sequence_rows(const DecodeParams& params, const SeqlenInfo& seqlen, int batch) {
  const int declared = is_shared(params, batch) ? seqlen.seqlen_q : params.seqlen_q;
  return min_int(seqlen.seqlen_q, declared) * params.rows_per_token;
}

// Every query sees all shared keys; calls with such have no window but the causal one, no chunks and no prefix_lens.
BROADHEAD_HOST_DEVICE AttentionMask make_mask(const DecodeParams& params, const SeqlenInfo& seqlen, int batch) {
  const int window_right = is_shared(params, batch) ? -1 : params.window_right;
  return {seqlen.seqlen_q, seqlen.seqlen_k,        params.window_left,
          window_right,    params.attention_chunk, sequence_prefix(params, batch, seqlen.seqlen_k)};
}

}  // namespace broadhead::decode
