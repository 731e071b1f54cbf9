// Writes gradients from accumulators, 16 bytes of a row a lane.
#pragma once

#include "common/device.h"
#include "common/quad.h"
#include "host/params.h"

namespace broadhead {

// The rows of one sequence and head of a gradient in global memory.
template <class Element>
struct GradientRows {
  Element* base;  // row 0 of the sequence
  long long row_stride;
  int end_row;
  int columns;
};

template <class Element>
BROADHEAD_DEVICE GradientRows<Element> gradient_rows(void* tensor, const TensorStrides& strides, int batch,
                                                     std::int64_t row, int head, int end_row, int columns) {
  Element* base = static_cast<Element*>(tensor) + batch * strides.batch + row * strides.row + head * strides.head;
  return {base, strides.row, end_row, columns};
}

// factor * gradient, of the lane's row `row` of the sequence and the one eight below; zeros where `keep` is false.
// Lanes of a quad exchange words, so that each stores 16 bytes of a row.
template <class Element, int kTiles>
BROADHEAD_DEVICE void write_gradient(const float (&gradient)[kTiles][4], float factor,
                                     const GradientRows<Element>& target, int row, const bool (&keep)[2]) {
  static_assert(kTiles % 4 == 0);
  const int quad = threadIdx.x % 4;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool live = row + 8 * i < target.end_row;
    Element* to = target.base + (row + 8 * i) * target.row_stride + quad * 8;
    BROADHEAD_UNROLL
    for (int t = 0; t < kTiles; t += 4) {
      std::uint32_t words[4];
      BROADHEAD_UNROLL
      for (int u = 0; u < 4; ++u) {
        const auto& tile = gradient[t + u];
        words[u] = keep[i] ? pack_pair<Element>(tile[2 * i] * factor, tile[2 * i + 1] * factor) : 0u;
      }
      const uint4 part = transpose_quad(words, quad);
      if (live && t * 8 + quad * 8 < target.columns) *reinterpret_cast<uint4*>(to + t * 8) = part;
    }
  }
}

}  // namespace broadhead
