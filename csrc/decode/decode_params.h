// The parameters of a decode kernel, and how it reads the lengths, rows and mask of a sequence from them.
#pragma once

#include "common/attention_mask.h"
#include "common/seqlen_info.h"

namespace broadhead::decode {

// AttnParams with what the host works out of a decode call, since code before the first copies is cold and slow.
struct DecodeParams : AttnParams {
  int tile_cost;   // what a tile costs besides its n_blocks (Q, the merge of the warps, the output), in n_blocks
  unsigned pages;  // page ids below this exist; 1 when not paged
  int sees_all;    // every query sees all keys, so no mask is computed: code before the first copies is cold and slow
  // Bytes of q and of the page tables that the grid prefetches into the L2 before it knows what it needs; 0 when the
  // tensor is not one piece of memory.
  unsigned q_bytes;
  unsigned table_bytes;
  unsigned shared_table_bytes;
  // The keys that all sequences share are scheduled as one more sequence.
  int shared_sequences;             // 1; 0 when there are no shared keys
  int shared_tokens;                // query tokens of all sequences
  const std::int32_t* live_tokens;  // int32 (1), nullable: how many of these are live, as packed q may be longer
};

// Whether every query of a call sees all keys of its sequence.
inline bool sees_all(const AttnParams& params) {
  const bool one_token = params.seqlen_q == 1;  // it stands at the last key of its sequence
  const MaskRule& rule = params.mask_rule;
  const bool causal = rule.window_right >= 0 || params.mask_values.causal_by_sequence != nullptr;
  // Where a query sees all keys by its position, a range shows nothing more.
  return rule.window_left < 0 && (!causal || one_token) && rule.attention_chunk == 0 && params.prefix_lens == nullptr &&
         params.mask_values.tree_mask == nullptr;
}

// How many sequences are scheduled: those of the call and, behind them, that of the shared keys.
BROADHEAD_HOST_DEVICE int sequences(const DecodeParams& params) { return params.batch + params.shared_sequences; }

// Whether sequence `batch` is that of the shared keys.
BROADHEAD_HOST_DEVICE bool is_shared(const DecodeParams& params, int batch) { return batch == params.batch; }

// The lengths and offsets of a scheduled sequence.
BROADHEAD_HOST_DEVICE SeqlenInfo sequence_info(const DecodeParams& params, int batch) {
  if (!is_shared(params, batch)) return make_seqlen_info(params, batch);
  int tokens = params.shared_tokens;
  // Rows of packed q behind the last sequence may hold anything.
  if (params.live_tokens != nullptr) tokens = max_int(0, min_int(tokens, *params.live_tokens));
  return {0, 0, tokens, params.shared_seqlen_k, 0, 0};
}

// Query rows of one head in the grid. A sequence has no more than the call declared (max_seqlen_q), since the workspace
// has room for those only.
BROADHEAD_HOST_DEVICE int sequence_rows(const DecodeParams& params, const SeqlenInfo& seqlen, int batch) {
  const int declared = is_shared(params, batch) ? seqlen.seqlen_q : params.seqlen_q;
  return min_int(seqlen.seqlen_q, declared) * params.rows_per_token;
}

// The mask of a sequence. Every query sees all shared keys, and a call with shared keys has no other mask than causal.
BROADHEAD_HOST_DEVICE AttentionMask make_mask(const DecodeParams& params, const SeqlenInfo& seqlen, int batch) {
  AttentionMask mask{seqlen.seqlen_q, seqlen.seqlen_k, params.mask_rule, 0};
  if (is_shared(params, batch)) {
    mask.rule.window_right = -1;
    return mask;
  }
  mask.prefix_len = sequence_prefix(params, batch, seqlen.seqlen_k);
  if (gives_masks(params)) mask.give(params.sequence_masks[batch]);
  return mask;
}

}  // namespace broadhead::decode
