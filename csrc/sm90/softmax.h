// Softmax of a warpgroup's key blocks that looks for a new maximum only when it must.
//
// exp(S - reference) is computed with the reference of the blocks before. Only when a lane's sum says that something
// may have grown too large is the block's maximum found, the reference raised to it, and the block computed again:
// exact, because the last division cancels any reference. On random data this is the first block of a tile and little
// else. It saves 64 of 300 instructions a row, and two rounds of shuffles on the way from S to P.
// PERF(H200, head_dim 128 full: 635 -> TFLOP/s, see docs/performance-log.md)
#pragma once

#include <cmath>

#include "common/online_softmax.h"

namespace broadhead::sm90 {

struct LazySoftmax : OnlineSoftmax<2> {
  // A lane's share of a row's sum over one block; P stays below it, within fp16.
  static constexpr float kLargestSum = 8192.f;

  // P of the block from S, packed as A operand of wgmma; true when O must be multiplied by `factor` first.
  template <class Element, int kKeyTiles>
  BROADHEAD_DEVICE bool compute_p(std::uint32_t (&p)[kKeyTiles / 2][4], const float (&s)[1][kKeyTiles][4],
                                  float scale_log2, float (&factor)[2], bool first) {
    float sum[2];
    if (!first) {
      // A row without a reference yet has offset -inf, and a sum that is infinite or NaN.
      const float offset[2] = {row_max[0] * scale_log2, row_max[1] * scale_log2};
      compute<Element>(p, s, scale_log2, offset, sum);
      if (!__any_sync(0xffffffffu, !(sum[0] <= kLargestSum) || !(sum[1] <= kLargestSum))) {
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
        return false;
      }
    }
    float found[2];
    block_max(s, found);
    float offset[2];
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float raised = fmaxf(row_max[i], found[i]);
      factor[i] = row_max[i] == -INFINITY ? 0.f : exp2f((row_max[i] - raised) * scale_log2);
      row_max[i] = raised;
      offset[i] = raised == -INFINITY ? 0.f : raised * scale_log2;
    }
    compute<Element>(p, s, scale_log2, offset, sum);
    row_sum[0] = row_sum[0] * factor[0] + sum[0];
    row_sum[1] = row_sum[1] * factor[1] + sum[1];
    return true;
  }

  template <class Element, int kKeyTiles>
  BROADHEAD_DEVICE static void compute(std::uint32_t (&p)[kKeyTiles / 2][4], const float (&s)[1][kKeyTiles][4],
                                       float scale_log2, const float (&offset)[2], float (&sum)[2]) {
    sum[0] = sum[1] = 0.f;
    BROADHEAD_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      BROADHEAD_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float x = exp2_approx(fmaf(s[0][n][2 * i], scale_log2, -offset[i]));
        const float y = exp2_approx(fmaf(s[0][n][2 * i + 1], scale_log2, -offset[i]));
        sum[i] += x + y;
        p[n / 2][n % 2 * 2 + i] = pack_pair<Element>(x, y);
      }
    }
  }
};

}  // namespace broadhead::sm90
