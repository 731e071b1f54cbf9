// Plain calls: what most calls are. Kernels have code of their own for them, without what other calls ask for.
//
// PERF(H200): a kernel begins with code that no cache holds. What a call does not run still lies between what it runs,
// so that the instruction fetch runs ahead in vain: of the 24 us of a call of 146 queries and 30 keys, 14 were spent
// waiting for instructions, while all of FlashAttention-2's call took 7.
#pragma once

#include "common/attention_mask.h"
#include "common/macros.h"
#include "host/params.h"

namespace broadhead {

// A mask that follows from window_left and window_right, and scores that are only scaled.
BROADHEAD_HOST_DEVICE bool has_plain_mask(const AttnParams& params) {
  return params.prefix_lens == nullptr && params.sequence_masks == nullptr && params.mask_rule.attention_chunk == 0 &&
         params.softcap == 0.f && params.softmax_scale > 0.f;
}

// Tells the compiler so, so that what it reads of these fields are constants.
BROADHEAD_DEVICE void assume_plain_mask(const AttnParams& params) {
  BROADHEAD_ASSUME(params.prefix_lens == nullptr);
  BROADHEAD_ASSUME(params.sequence_masks == nullptr);
  BROADHEAD_ASSUME(params.mask_rule.attention_chunk == 0);
  BROADHEAD_ASSUME(params.softcap == 0.f);
}

// Dense or packed sequences, of which one CTA sees all keys of its tile, under such a mask.
BROADHEAD_HOST_DEVICE bool is_plain(const AttnParams& params) {
  return has_plain_mask(params) && params.page_table == nullptr && params.leftpad_k == nullptr &&
         params.kv_batch_idx == nullptr && params.scheduler_metadata == nullptr && params.num_splits == 1;
}

BROADHEAD_DEVICE void assume_plain(const AttnParams& params) {
  assume_plain_mask(params);
  BROADHEAD_ASSUME(params.page_table == nullptr);
  BROADHEAD_ASSUME(params.leftpad_k == nullptr);
  BROADHEAD_ASSUME(params.kv_batch_idx == nullptr);
  BROADHEAD_ASSUME(params.scheduler_metadata == nullptr);
  BROADHEAD_ASSUME(params.num_splits == 1);
}

// Traits of the kernel for plain calls.
template <class Traits>
struct PlainCall : Traits {
  static constexpr bool kPlainCall = true;
};

// The mask of a plain call's sequence.
BROADHEAD_HOST_DEVICE AttentionMask plain_mask(int seqlen_q, int seqlen_k, const MaskRule& rule) {
  return {seqlen_q, seqlen_k, {rule.window_left, rule.window_right, 0}, 0};
}

// The same of a tile. It lies in shared memory, where the compiler does not know what was assumed of the call.
template <class State>
BROADHEAD_DEVICE AttentionMask plain_mask(const State& state) {
  return plain_mask(state.mask.seqlen_q, state.mask.seqlen_k, state.mask.rule);
}

}  // namespace broadhead
