// What a warp computes of one step: S and dP of its rows, P and dS from them, and its share of the gradients.
#pragma once

#include "common/accumulator.h"
#include "mma_sync/fragments.h"
#include "sm80/backward/traits.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// The place of a warp and its lane in the tiles.
struct WarpPlace {
  int lane;
  int warp_r;
  int warp_c;
};

template <class Traits>
using Scores = float[Traits::kRowTiles][Traits::kColTiles][4];

template <class Traits>
using Gradient = float[Traits::kRowTiles][Traits::kOutTiles][4];

// The row of accumulator element `c` of row tile `m`, within the tile.
template <class Traits>
BROADHEAD_DEVICE int tile_row(const WarpPlace& place, int m, int c) {
  return place.warp_r * Traits::kRowsPerWarp + m * 16 + place.lane / 4 + c / 2 * 8;
}

// The column of element 0 of column tile `n`, within the tile; that of element 1 follows it.
template <class Traits>
BROADHEAD_DEVICE int tile_col(const WarpPlace& place, int n) {
  return place.warp_c * Traits::kColsPerWarp + n * 8 + place.lane % 4 * 2;
}

// `s` = rows x columns^T over the head_dim; `columns` of it are not zero.
template <class Traits>
BROADHEAD_DEVICE void multiply_rows(Scores<Traits>& s, const void* rows, const void* cols, const WarpPlace& place,
                                    int columns) {
  using Element = typename Traits::Element;
  constexpr bool kPairs = Traits::kColTiles % 2 == 0;
  const int lane = place.lane, swizzle = lane & 7;
  const std::uint32_t a_lane =
      smem_address(rows) + (place.warp_r * Traits::kRowsPerWarp + (lane & 15)) * 128 + (((lane >> 4) ^ swizzle) * 16);
  // 16 columns x 16 of head_dim a load, or 8 x 32.
  const int col = place.warp_c * Traits::kColsPerWarp + (lane & 7) + (kPairs ? (lane >> 4) << 3 : 0);
  const int unit = kPairs ? (lane >> 3) & 1 : lane >> 3;
  const std::uint32_t b_lane = smem_address(cols) + col * 128 + ((unit ^ swizzle) * 16);
  clear_accumulators(s);
  BROADHEAD_UNROLL
  for (int step = 0; step < Traits::kHeadDim / 16; step += kPairs ? 1 : 2) {
    if (Traits::kHeadDim > 256 && step % 4 == 0 && step * 16 >= columns) break;
    const std::uint32_t b_step = (b_lane ^ (step % 4 * 32)) + step / 4 * (Traits::kCols * 128);
    std::uint32_t a[kPairs ? 1 : 2][Traits::kRowTiles][4];
    BROADHEAD_UNROLL
    for (int i = 0; i < (kPairs ? 1 : 2); ++i) {
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ldmatrix_x4(a[i][m],
                    (a_lane ^ ((step + i) % 4 * 32)) + (step + i) / 4 * (Traits::kRows * 128) + m * (16 * 128));
      }
    }
    std::uint32_t b[4];
    if constexpr (kPairs) {
      BROADHEAD_UNROLL
      for (int n = 0; n < Traits::kColTiles; n += 2) {
        ldmatrix_x4(b, b_step + n * (8 * 128));
        BROADHEAD_UNROLL
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          mma<Element>(s[m][n], a[0][m], b[0], b[1]);
          mma<Element>(s[m][n + 1], a[0][m], b[2], b[3]);
        }
      }
    } else {
      ldmatrix_x4(b, b_step);
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        mma<Element>(s[m][0], a[0][m], b[0], b[1]);
        mma<Element>(s[m][0], a[1][m], b[2], b[3]);
      }
    }
  }
}

// Which pairs of a step are not seen; `whole`: all are.
struct StepMask {
  const AttentionMask& mask;
  int first_row;
  int first_col;
  bool whole;
};

template <class Traits, Side kSide>
BROADHEAD_DEVICE StepMask make_step_mask(const BackwardState& state, int first_col) {
  const int first_query = kSide == Side::kQueries ? state.first_row : first_col;
  const int first_key = kSide == Side::kQueries ? first_col : state.first_row;
  constexpr int kQueries = kSide == Side::kQueries ? Traits::kRows : Traits::kCols;
  constexpr int kKeys = kSide == Side::kQueries ? Traits::kCols : Traits::kRows;
  const int last_query = min_int(first_query + kQueries, state.mask.seqlen_q) - 1;
  const KeyInterval all = state.mask.unmasked_interval(first_query, last_query);
  return {state.mask, state.first_row, first_col, first_key >= all.begin && first_key + kKeys <= all.end};
}

// From S and dP to P and dS, in place. `stats(i)`: {LSE in units of log2(e), D} of the query in row i of the lane's
// rows (queries) or in column tile i / 2, element i % 2 (keys).
//   P = exp(scale S - LSE);  dS = P (dP - D), times the derivative of the softcap. The scale joins at the end.
template <class Traits, Side kSide, class Stats>
BROADHEAD_DEVICE void differentiate_scores(Scores<Traits>& s, Scores<Traits>& dp, const StepMask& step,
                                           const ScoreScale& scale, const WarpPlace& place, const Stats& stats) {
  const bool capped = scale.softcap > 0.f;
  const float factor = capped ? kLog2e : scale.inner * kLog2e;
  const float inverse_cap = capped ? 1.f / scale.softcap : 0.f;
  BROADHEAD_UNROLL
  for (int n = 0; n < Traits::kColTiles; ++n) {
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      BROADHEAD_UNROLL
      for (int c = 0; c < 4; ++c) {
        const float2 of_query = stats(kSide == Side::kQueries ? 2 * m + c / 2 : 2 * n + c % 2);
        float x = s[m][n][c], slope = 1.f;
        if (capped) {
          x = scale.cap(x);
          const float t = x * inverse_cap;
          slope = 1.f - t * t;
        }
        const float p = exp2_approx(fmaf(x, factor, -of_query.x));
        s[m][n][c] = p;
        dp[m][n][c] = p * (dp[m][n][c] - of_query.y) * slope;
      }
    }
  }
  if (step.whole) return;
  BROADHEAD_UNROLL
  for (int n = 0; n < Traits::kColTiles; ++n) {
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      BROADHEAD_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int row = step.first_row + tile_row<Traits>(place, m, c);
        const int col = step.first_col + tile_col<Traits>(place, n) + c % 2;
        const int query = kSide == Side::kQueries ? row : col, key = kSide == Side::kQueries ? col : row;
        // Not a product with 0: what is not seen may be NaN.
        if (!step.mask.visible(step.mask.row_interval(query), key)) s[m][n][c] = dp[m][n][c] = 0.f;
      }
    }
  }
}

// Stores P or dS of the warp for its row group, from column `first` of the exchange on.
template <class Traits>
BROADHEAD_DEVICE void store_exchange(void* exchange, const Scores<Traits>& s, int first, const WarpPlace& place) {
  char* base = static_cast<char*>(exchange);
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; ++n) {
      const int row = tile_row<Traits>(place, m, 0);
      const int col = first + place.warp_c * Traits::kColsPerWarp + n * 8;
      char* target =
          base + col / 64 * (Traits::kRows * 128) + row * 128 + ((col / 8 % 8) ^ (row & 7)) * 16 + place.lane % 4 * 4;
      *reinterpret_cast<std::uint32_t*>(target) = pack_pair<typename Traits::Element>(s[m][n][0], s[m][n][1]);
      *reinterpret_cast<std::uint32_t*>(target + 8 * 128) = pack_pair<typename Traits::Element>(s[m][n][2], s[m][n][3]);
    }
  }
}

// gradient += weights x columns, over the columns of a step; weights are P or dS: `s`, or the exchange from column
// `first` on.
template <class Traits>
BROADHEAD_DEVICE void add_gradient(Gradient<Traits>& gradient, const Scores<Traits>& s, const void* exchange, int first,
                                   const void* cols, const WarpPlace& place, int columns) {
  using Element = typename Traits::Element;
  const int lane = place.lane, swizzle = lane & 7;
  const std::uint32_t a_lane = smem_address(exchange) + (place.warp_r * Traits::kRowsPerWarp + (lane & 15)) * 128;
  const std::uint32_t b_lane = smem_address(cols) + (lane & 15) * 128;
  const int first_col = place.warp_c * Traits::kOutCols;
  BROADHEAD_UNROLL
  for (int step = 0; step < Traits::kCols / 16; ++step) {
    std::uint32_t a[Traits::kRowTiles][4];
    if constexpr (Traits::kExchange) {
      const int col = first + step * 16;
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ldmatrix_x4(a[m], a_lane + col / 64 * (Traits::kRows * 128) + m * (16 * 128) +
                              (((col / 8 % 8 + (lane >> 4)) ^ swizzle) * 16));
      }
    } else {
      pack_p<Element>(a, s, step);
    }
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kOutTiles; n += 2) {
      const int col = first_col + n * 8;
      if (Traits::kHeadDim > 256 && col >= columns) break;  // the same in the whole warp
      std::uint32_t b[4];
      ldmatrix_x4_trans(b, b_lane + col / 64 * (Traits::kCols * 128) + step * (16 * 128) +
                               (((col / 8 % 8 + (lane >> 4)) ^ swizzle) * 16));
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        mma<Element>(gradient[m][n], a[m], b[0], b[1]);
        mma<Element>(gradient[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace broadhead::sm80
