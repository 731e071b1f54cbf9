// The end of a tile of the e4m3 kernel: where its rows go, what O is multiplied by, and the LSE.
#pragma once

#include "sm90/epilogue.h"
#include "sm90/softmax.h"

namespace broadhead::sm90 {

// Writes the LSE of this thread's two rows. `rows`: where they go; O times `inverse` is the output.
template <class Traits>
BROADHEAD_DEVICE void finish_fp8_rows(const AttnParams& params, const TileState<typename Traits::Element>& state,
                                      BlockSoftmax<true>& softmax, RowPlace (&rows)[2], float (&inverse)[2],
                                      int split) {
  const int thread = fresh_thread();
  place_rows(rows, state.output, (thread / 32 - 4) * 16 + thread % 32 / 4);
  softmax.reduce_sum();
  constexpr float kUnit = 1.f / 256.f;  // 2^-BlockSoftmax::kShift: P was that much larger
  BROADHEAD_UNROLL
  for (int i = 0; i < 2; ++i) {
    const RowResult result = finish_row<typename Traits::OutElement>(
        params, rows[i], {softmax.row_max[i], softmax.row_sum[i] * kUnit}, state.scale, split);
    inverse[i] = result.inverse * (kUnit * state.scale.v_factor);
    if (thread % 4 == 0) write_lse(params, state.seqlen, rows[i], result.lse, split);
  }
  drop_empty(rows, inverse[0] == 0.f, inverse[1] == 0.f, split);
}

}  // namespace broadhead::sm90
