// The online softmax over n_blocks for the rows of one warp (mma.sync C layout: a lane holds 2 rows per 16).
//
// The running maximum is raised only when an n_block exceeds it by more than 2^kSlackLog2 in the exponent. This is
// exact, because the final division cancels any reference value, and it saves rescaling O in almost every n_block. P
// stays below 2^8, which fp16 holds.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace broadhead {

template <int kRows>
struct OnlineSoftmax {
  static constexpr float kSlackLog2 = 8.f;

  float row_max[kRows];  // reference value, in units of S
  float row_sum[kRows];  // the sum over this lane's keys

  BROADHEAD_DEVICE OnlineSoftmax() {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row_max[i] = -INFINITY;
      row_sum[i] = 0.f;
    }
  }

  // The maximum of each row over this warp's keys, the same in the four lanes of a row.
  template <int kMmaM, int kMmaN>
  BROADHEAD_DEVICE static void block_max(const float (&s)[kMmaM][kMmaN][4], float (&max)[kRows]) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int m = i / 2, c = (i % 2) * 2;
      float x = fmaxf(s[m][0][c], s[m][0][c + 1]);
      BROADHEAD_UNROLL
      for (int n = 1; n < kMmaN; ++n) x = fmaxf(x, fmaxf(s[m][n][c], s[m][n][c + 1]));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      max[i] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    }
  }

  // Takes the row maxima of an n_block, and raises the references to them if one exceeds its own by more than `slack`;
  // true when O must be multiplied by `factor` (the same answer in all lanes of a warp).
  BROADHEAD_DEVICE bool raise(const float (&max)[kRows], float scale_log2, float (&factor)[kRows],
                              float slack = kSlackLog2) {
    bool exceeds = false;
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) exceeds |= (max[i] - row_max[i]) * scale_log2 > slack;
    if (!__any_sync(0xffffffffu, exceeds)) return false;
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float raised = fmaxf(row_max[i], max[i]);
      factor[i] = row_max[i] == -INFINITY ? 0.f : exp2f((row_max[i] - raised) * scale_log2);
      row_max[i] = raised;
      row_sum[i] *= factor[i];
    }
    return true;
  }

  // S <- exp(scale * (S - row_max)) for the 8-key tiles [kFirst, kFirst + kCount), summed into row_sum.
  template <int kFirst, int kCount, int kMmaM, int kMmaN, class Exp2>
  BROADHEAD_DEVICE void exponentiate(float (&s)[kMmaM][kMmaN][4], float scale_log2, Exp2 exp2) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int m = i / 2, c = (i % 2) * 2;
      const float offset = row_max[i] == -INFINITY ? 0.f : row_max[i] * scale_log2;
      BROADHEAD_UNROLL
      for (int n = kFirst; n < kFirst + kCount; ++n) {
        s[m][n][c] = exp2(fmaf(s[m][n][c], scale_log2, -offset));
        s[m][n][c + 1] = exp2(fmaf(s[m][n][c + 1], scale_log2, -offset));
      }
      float sum = s[m][kFirst][c] + s[m][kFirst][c + 1];
      BROADHEAD_UNROLL
      for (int n = kFirst + 1; n < kFirst + kCount; ++n) sum += s[m][n][c] + s[m][n][c + 1];
      row_sum[i] += sum;
    }
  }

  BROADHEAD_DEVICE void reduce_sum() {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 1);
      row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 2);
    }
  }
};

}  // namespace broadhead
