// Writes a warp's share of a gradient.
#pragma once

#include "sm80/backward/load.h"
#include "sm80/backward/mainloop.h"

namespace broadhead::sm80 {

// Rows of one sequence and head of a gradient in global memory.
template <class Element>
struct RowTarget {
  Element* base;
  long long row_stride;
  int end_row;
  int columns;
};

template <class Element>
BROADHEAD_DEVICE RowTarget<Element> target_of(const RowSource<Element>& rows) {
  return {const_cast<Element*>(rows.base), rows.row_stride, rows.live.interval.end, rows.columns};
}

// factor * gradient. Neighbouring lanes write neighbouring columns, 16 bytes of a row together.
template <class Traits>
BROADHEAD_DEVICE void write_gradient(const Gradient<Traits>& gradient, float factor,
                                     const RowTarget<typename Traits::Element>& target, int first_row,
                                     const WarpPlace& place) {
  using Element = typename Traits::Element;
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    BROADHEAD_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + tile_row<Traits>(place, m, 2 * half);
      if (row >= target.end_row) continue;
      Element* to = target.base + row * target.row_stride + place.lane % 4 * 2;
      BROADHEAD_UNROLL
      for (int n = 0; n < Traits::kOutTiles; ++n) {
        const int col = out_col<Traits>(place, n);
        if (col >= target.columns) break;
        *reinterpret_cast<std::uint32_t*>(to + col) =
            pack_pair<Element>(gradient[m][n][2 * half] * factor, gradient[m][n][2 * half + 1] * factor);
      }
    }
  }
}

}  // namespace broadhead::sm80
