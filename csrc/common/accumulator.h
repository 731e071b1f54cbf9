// Clears and scales the accumulators of a warp.
//
// A tile is 8 columns of 16 rows; a lane holds two columns of two rows of it, in the order of mma.sync and wgmma.
#pragma once

#include "common/macros.h"

namespace broadhead {

// Row `i` of the lane's two in each 16-row tile, from the warp's first on.
// The portable forward kernel writes this out: with the function nvcc (13.0) makes other code of it for 12.0.
BROADHEAD_DEVICE int accumulator_row(int i, int lane) { return i / 2 * 16 + i % 2 * 8 + lane / 4; }

template <int kTiles>
BROADHEAD_DEVICE void clear_accumulators(float (&x)[kTiles][4]) {
  BROADHEAD_UNROLL
  for (int t = 0; t < kTiles; ++t) x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0.f;
}

template <int kCount, int kTiles>
BROADHEAD_DEVICE void clear_accumulators(float (&x)[kCount][kTiles][4]) {
  BROADHEAD_UNROLL
  for (int i = 0; i < kCount; ++i) clear_accumulators(x[i]);
}

// Multiplies the lane's two rows.
template <int kTiles>
BROADHEAD_DEVICE void scale_rows(float (&o)[kTiles][4], float first, float second) {
  BROADHEAD_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    o[t][0] *= first;
    o[t][1] *= first;
    o[t][2] *= second;
    o[t][3] *= second;
  }
}

// The same for several 16-row tiles, two factors each.
template <int kMmaM, int kTiles>
BROADHEAD_DEVICE void scale_rows(float (&o)[kMmaM][kTiles][4], const float (&factor)[2 * kMmaM]) {
  BROADHEAD_UNROLL
  for (int m = 0; m < kMmaM; ++m) scale_rows(o[m], factor[2 * m], factor[2 * m + 1]);
}

}  // namespace broadhead
