// What happens to raw scores before the softmax: softcap (or a scale that is not positive) and the mask.
#pragma once

#include "sm80/forward_traits.h"

namespace broadhead {

// Sets what a query does not see of keys [key0, key0 + kKeysPerWarp) to -inf. Lane layout as in OnlineSoftmax.
// `unmasked`: the keys that every row of the tile sees.
template <class Traits>
BROADHEAD_DEVICE void apply_mask(float (&s)[Traits::kMmaM][Traits::kMmaN][4], const AttentionMask& mask,
                                 const KeyInterval& unmasked, const RowMap& rows, int warp_row, int key0, int lane) {
  const int first_key = key0 + (lane % 4) * 2;
  if (mask.prefix_len == 0 && key0 >= unmasked.begin) {
    // Only the upper end cuts: the diagonal of a causal mask, or the end of the sequence.
    if (mask.row_interval(rows.token(warp_row)).end >= key0 + Traits::kKeysPerWarp) return;
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
      const int m = i / 2, c = (i % 2) * 2;
      const int token = rows.token(warp_row + m * 16 + (i % 2) * 8 + lane / 4);
      const int live = mask.row_interval(token).end - first_key;
      BROADHEAD_UNROLL
      for (int n = 0; n < Traits::kMmaN; ++n) {
        if (n * 8 >= live) s[m][n][c] = -INFINITY;
        if (n * 8 + 1 >= live) s[m][n][c + 1] = -INFINITY;
      }
    }
    return;
  }
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
    const int m = i / 2, c = (i % 2) * 2;
    const int token = rows.token(warp_row + m * 16 + (i % 2) * 8 + lane / 4);
    const KeyInterval visible = mask.row_interval(token);
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kMmaN; ++n) {
      if (!mask.visible(visible, first_key + n * 8)) s[m][n][c] = -INFINITY;
      if (!mask.visible(visible, first_key + n * 8 + 1)) s[m][n][c + 1] = -INFINITY;
    }
  }
}

}  // namespace broadhead
