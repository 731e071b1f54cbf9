// Reductions over the 32 lanes of a warp, or over neighbouring kLanes of them. All lanes must call them, and all get
// the result.
#pragma once

#include "common/macros.h"

namespace broadhead {

template <int kLanes = 32, class T>
BROADHEAD_DEVICE T warp_sum(T x) {
  BROADHEAD_UNROLL
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The maximum of floats leaves NaN out, as fmaxf does.
template <class T>
BROADHEAD_DEVICE T warp_max(T x) {
  BROADHEAD_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

}  // namespace broadhead
