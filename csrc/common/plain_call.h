// Plain calls: what most calls are. Kernels have code of their own for them, without what other calls ask for: for
// those whose keys lie side by side, for those whose keys lie in pages, and on Hopper for those whose keys are divided.
//
// PERF(H200): a kernel begins with code that no cache holds. What a call does not run still lies between what it runs,
// so that the instruction fetch runs ahead in vain: of the 24 us of a call of 146 queries and 30 keys, 14 were spent
// waiting for instructions, while all of FlashAttention-2's call took 7.
#pragma once

#include <type_traits>

#include "common/attention_mask.h"
#include "common/macros.h"
#include "host/params.h"

namespace broadhead {

// A mask that follows from window_left and window_right, and scores that are only scaled.
BROADHEAD_HOST_DEVICE bool is_plain(const AttnParams& params) {
  return params.prefix_lens == nullptr && params.sequence_masks == nullptr && params.mask_rule.attention_chunk == 0 &&
         params.softcap == 0.f && params.softmax_scale > 0.f && params.leftpad_k == nullptr &&
         (params.kv_batch_idx == nullptr || params.page_table != nullptr);
}

// Traits of the kernel for plain calls of dense or packed sequences, and of the one for plain calls over pages. One CTA
// sees all keys of its tile.
template <class Traits>
struct PlainCall : Traits {
  static constexpr bool kPlainCall = true;
  static constexpr bool kPages = false;
  static constexpr bool kSplits = false;
};

template <class Traits>
struct PagedCall : Traits {
  static constexpr bool kPlainCall = true;
  static constexpr bool kSplits = false;
};

// Traits of the kernel for plain calls whose keys are divided: several CTAs may share those of a tile, in pages or not.
template <class Traits>
struct SplitCall : Traits {
  static constexpr bool kPlainCall = true;
  static constexpr bool kMaskByWords = true;
};

// The traits of the kernels that run plain calls over pages, and divided ones.
template <class Traits>
using PagedCallOr = std::conditional_t<Traits::kNoPagedCall, Traits, PagedCall<Traits>>;
template <class Traits>
using SplitCallOr = std::conditional_t<Traits::kNoSplitCall, Traits, SplitCall<Traits>>;

// Tells the compiler what calls Traits are for, so that what it reads of these fields are constants.
template <class Traits>
BROADHEAD_DEVICE void assume_call(const AttnParams& params) {
  if constexpr (Traits::kPlainCall) {
    BROADHEAD_ASSUME(params.prefix_lens == nullptr);
    BROADHEAD_ASSUME(params.sequence_masks == nullptr);
    BROADHEAD_ASSUME(params.mask_rule.attention_chunk == 0);
    BROADHEAD_ASSUME(params.softcap == 0.f);
    BROADHEAD_ASSUME(params.leftpad_k == nullptr);
    if constexpr (!Traits::kPages) {
      BROADHEAD_ASSUME(params.page_table == nullptr);
      BROADHEAD_ASSUME(params.kv_batch_idx == nullptr);
    } else if constexpr (!Traits::kSplits) {
      BROADHEAD_ASSUME(params.page_table != nullptr);
    }
  }
  if constexpr (!Traits::kSplits) BROADHEAD_ASSUME(params.num_splits == 1);
}

// Whether keys lie in pages.
template <class Traits>
BROADHEAD_DEVICE bool is_paged(const AttnParams& params) {
  if constexpr (!Traits::kPages) return false;
  return params.page_table != nullptr;
}

// Whether the keys of each sequence end where a dimension of their tensor does.
BROADHEAD_DEVICE bool has_dense_keys(const AttnParams& params) {
  return params.page_table == nullptr && params.cu_seqlens_k == nullptr && params.seqused_k == nullptr;
}

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
