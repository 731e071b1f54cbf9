// What happens to raw scores before the softmax: softcap (or a scale that is not positive) and the mask.
#pragma once

#include "sm80/forward_traits.h"

namespace broadhead {

constexpr float kLog2e = 1.4426950408889634f;

// The softmax works on exp2(S * scale_log2 - max): a scale <= 0 would turn the maximum into a minimum, and softcap is not
// linear, so in both cases S is transformed first (`transform`) and the remaining scale is 1.
struct ScoreScale {
  float scale_log2;
  float scale;       // of the remaining S, natural units
  float softcap;
  float inner;       // softcap: scale / softcap; else scale
  bool transform;

  BROADHEAD_DEVICE ScoreScale(float softmax_scale, float softcap_) : softcap(softcap_) {
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

// Sets what a query does not see to -inf. Lane layout as in OnlineSoftmax.
template <class Traits>
BROADHEAD_DEVICE void apply_mask(float (&s)[Traits::kMmaM][Traits::kMmaN][4], const AttentionMask& mask,
                                 const RowMap& rows, int warp_row, int key0, int lane) {
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
    const int m = i / 2, c = (i % 2) * 2;
    const int token = rows.token(warp_row + m * 16 + (i % 2) * 8 + lane / 4);
    const KeyInterval visible = mask.row_interval(token);
    const int key = key0 + (lane % 4) * 2;
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kMmaN; ++n) {
      if (!mask.visible(visible, key + n * 8)) s[m][n][c] = -INFINITY;
      if (!mask.visible(visible, key + n * 8 + 1)) s[m][n][c + 1] = -INFINITY;
    }
  }
}

}  // namespace broadhead
