// Integer helpers shared by host and device.
#pragma once

#include "common/macros.h"

namespace broadhead {

BROADHEAD_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
BROADHEAD_HOST_DEVICE constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
BROADHEAD_HOST_DEVICE constexpr int min_int(int a, int b) { return a < b ? a : b; }
BROADHEAD_HOST_DEVICE constexpr int max_int(int a, int b) { return a > b ? a : b; }
BROADHEAD_HOST_DEVICE constexpr long long min_int64(long long a, long long b) { return a < b ? a : b; }
BROADHEAD_HOST_DEVICE constexpr long long max_int64(long long a, long long b) { return a > b ? a : b; }
// low <= high.
BROADHEAD_HOST_DEVICE constexpr int clamp_int(int x, int low, int high) { return max_int(low, min_int(x, high)); }

// Rounds towards minus infinity: a query position is negative when seqlen_q > seqlen_k.
BROADHEAD_HOST_DEVICE constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace broadhead
