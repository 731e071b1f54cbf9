// The four lanes of a warp that hold a row of mma.sync and wgmma accumulators between them.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace broadhead {

// Transposes 4 x 4 words over the quad: afterwards lane q holds what word q of the four lanes was, so that it stores 16
// bytes of a row.
BROADHEAD_DEVICE uint4 transpose_quad(const std::uint32_t (&w)[4], int quad) {
  const bool odd = quad & 1;
  const bool upper = quad & 2;
  const std::uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
  const std::uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
  const std::uint32_t x0 = odd ? a : w[0], x1 = odd ? w[1] : a;
  const std::uint32_t y0 = odd ? b : w[2], y1 = odd ? w[3] : b;
  const std::uint32_t c = __shfl_xor_sync(0xffffffffu, upper ? x0 : y0, 2);
  const std::uint32_t d = __shfl_xor_sync(0xffffffffu, upper ? x1 : y1, 2);
  return upper ? uint4{c, d, y0, y1} : uint4{x0, x1, c, d};
}

}  // namespace broadhead
