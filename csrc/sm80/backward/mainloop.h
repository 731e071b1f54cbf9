// What a warp computes of one step: S and dP of its rows, and its share of the gradients.
#pragma once

#include "common/accumulator.h"
#include "mma_sync/fragments.h"
#include "sm80/backward/traits.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// The place of a warp and its lane in the tiles.
struct WarpPlace {
  int lane;
  int role;  // kRoles 2. 0: S, P and dV; 1: dP, dS and dK
  int warp_r;
  int warp_c;
};

template <class Traits>
BROADHEAD_DEVICE WarpPlace warp_place(unsigned thread) {
  constexpr unsigned kWarps = Traits::kWarpsR * Traits::kWarpsC;  // of a role
  const unsigned warp = thread / 32 % kWarps;
  return {static_cast<int>(thread % 32), static_cast<int>(thread / 32 / kWarps),
          static_cast<int>(warp / Traits::kWarpsC), static_cast<int>(warp % Traits::kWarpsC)};
}

template <class Traits>
using Scores = float[Traits::kRowTiles][Traits::kColTiles][4];

template <class Traits>
using Gradient = float[Traits::kRowTiles][Traits::kOutTiles][4];

// A operands of 16 columns of head_dim, for each row tile.
template <class Traits>
using RowFragments = std::uint32_t[Traits::kRowTiles][4];

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

// The first column of head_dim in tile `n` of the warp's gradient.
template <class Traits>
BROADHEAD_DEVICE int out_col(const WarpPlace& place, int n) {
  constexpr int kTiles = Traits::kOutTilesPerSubtile;
  return n / kTiles * 64 + place.warp_c * (8 * kTiles) + n % kTiles * 8;
}

// The A operands of the warp's rows, columns [16 * step, 16 * step + 16) of head_dim. `rows`: address of the tile.
template <class Traits>
BROADHEAD_DEVICE void load_rows(RowFragments<Traits>& a, std::uint32_t rows, const WarpPlace& place, int step) {
  const int lane = place.lane;
  const std::uint32_t first =
      rows + (place.warp_r * Traits::kRowsPerWarp + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) * 16);
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    ldmatrix_x4(a[m], (first ^ (step % 4 * 32)) + step / 4 * (Traits::kRows * 128) + m * (16 * 128));
  }
}

// `s` = rows x columns^T over the head_dim, of which `columns` are not zero. `load(a, step)` gives the rows' operands;
// `cols`: address of the tile of columns.
template <class Traits, class Load>
BROADHEAD_DEVICE void multiply_rows(Scores<Traits>& s, const Load& load, std::uint32_t cols, const WarpPlace& place,
                                    int columns) {
  using Element = typename Traits::Element;
  constexpr bool kPairs = Traits::kColTiles % 2 == 0;
  constexpr int kSteps = kPairs ? 1 : 2;  // a load of columns: 16 columns x 16 of head_dim, or 8 x 32
  const int lane = place.lane, swizzle = lane & 7;
  const int col = place.warp_c * Traits::kColsPerWarp + (lane & 7) + (kPairs ? (lane >> 4) << 3 : 0);
  const int unit = kPairs ? (lane >> 3) & 1 : lane >> 3;
  const std::uint32_t b_lane = cols + col * 128 + ((unit ^ swizzle) * 16);
  clear_accumulators(s);
  BROADHEAD_UNROLL
  for (int step = 0; step < Traits::kHeadDim / 16; step += kSteps) {
    if (Traits::kHeadDim > 256 && step % 4 == 0 && step * 16 >= columns) break;
    const std::uint32_t b_step = (b_lane ^ (step % 4 * 32)) + step / 4 * (Traits::kCols * 128);
    RowFragments<Traits> a[kSteps];
    BROADHEAD_UNROLL
    for (int i = 0; i < kSteps; ++i) load(a[i], step + i);
    std::uint32_t b[4];
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; n += 2) {
      ldmatrix_x4(b, b_step + n * (8 * 128));
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        mma<Element>(s[m][n], a[0][m], b[0], b[1]);
        mma<Element>(s[m][kPairs ? n + 1 : n], a[kPairs ? 0 : 1][m], b[2], b[3]);
      }
    }
  }
}

// Fragments of P or dS in shared memory: [row tile of the CTA][16 columns][lane], the four words of an A operand.
template <class Traits>
BROADHEAD_DEVICE int fragment_index(const WarpPlace& place, int m, int step) {
  return ((place.warp_r * Traits::kRowTiles + m) * (Traits::kCols / 16) + step) * 32 + place.lane;
}

// Stores and loads the words of the warp's own columns: word i is that of column tile i / 2. A warp with one tile of
// columns has half an operand.
template <class Traits>
struct OwnFragment {
  static constexpr int kTiles = Traits::kColTiles == 1 ? 1 : 2;

  // The words of row tile `m` and column tiles `n` to n + kTiles - 1.
  BROADHEAD_DEVICE static void store(uint4* fragments, const WarpPlace& place, int m, int n,
                                     const std::uint32_t (&words)[2 * kTiles]) {
    if constexpr (kTiles == 1) {
      reinterpret_cast<uint2*>(fragments + fragment_index<Traits>(place, m, place.warp_c / 2))[place.warp_c % 2] =
          make_uint2(words[0], words[1]);
    } else {
      fragments[fragment_index<Traits>(place, m, place.warp_c * (Traits::kColTiles / 2) + n / 2)] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  BROADHEAD_DEVICE static void load(const uint4* fragments, const WarpPlace& place, int m, int n,
                                    std::uint32_t (&words)[2 * kTiles]) {
    if constexpr (kTiles == 1) {
      const uint2 x = reinterpret_cast<const uint2*>(
          fragments + fragment_index<Traits>(place, m, place.warp_c / 2))[place.warp_c % 2];
      words[0] = x.x, words[1] = x.y;
    } else {
      const uint4 x = fragments[fragment_index<Traits>(place, m, place.warp_c * (Traits::kColTiles / 2) + n / 2)];
      words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
    }
  }
};

// Stores the warp's part of dS for its row group.
template <class Traits>
BROADHEAD_DEVICE void share_fragments(uint4* fragments, const Scores<Traits>& ds, const WarpPlace& place) {
  using Fragment = OwnFragment<Traits>;
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; n += Fragment::kTiles) {
      std::uint32_t words[2 * Fragment::kTiles];
      BROADHEAD_UNROLL
      for (int i = 0; i < 2 * Fragment::kTiles; ++i) {
        const auto& tile = ds[m][n + i / 2];
        words[i] = pack_pair<typename Traits::Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      }
      Fragment::store(fragments, place, m, n, words);
    }
  }
}

// P or dS as operands, for add_gradient: `s`, or the fragments of the row group.
template <class Traits>
BROADHEAD_DEVICE auto own_weights(const Scores<Traits>& s, const uint4* fragments, const WarpPlace& place) {
  return [&s, fragments, &place](RowFragments<Traits>& a, int step) {
    if constexpr (Traits::kShares) {
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        const uint4 x = fragments[fragment_index<Traits>(place, m, step)];
        a[m][0] = x.x, a[m][1] = x.y, a[m][2] = x.z, a[m][3] = x.w;
      }
    } else {
      pack_p<typename Traits::Element>(a, s, step);
    }
  };
}

// gradient += weights x columns, over the columns of a step. `weights(a, step)` gives the operands of 16 columns;
// `cols`: address of the tile of columns; `columns` of its head_dim are not zero.
template <class Traits, class Weights>
BROADHEAD_DEVICE void add_gradient(Gradient<Traits>& gradient, const Weights& weights, std::uint32_t cols,
                                   const WarpPlace& place, int columns) {
  using Element = typename Traits::Element;
  const int lane = place.lane;
  constexpr int kTiles = Traits::kOutTilesPerSubtile;
  const std::uint32_t b_lane = cols + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7) ^ (place.warp_c * kTiles)) * 16);
  BROADHEAD_UNROLL
  for (int step = 0; step < Traits::kCols / 16; ++step) {
    RowFragments<Traits> a;
    weights(a, step);
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kOutTiles; n += 2) {
      if (Traits::kHeadDim > 256 && out_col<Traits>(place, n) >= columns) break;  // the same in the whole warp
      std::uint32_t b[4];
      ldmatrix_x4_trans(b, (b_lane ^ (n % kTiles * 16)) + n / kTiles * (Traits::kCols * 128) + step * (16 * 128));
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        mma<Element>(gradient[m][n], a[m], b[0], b[1]);
        mma<Element>(gradient[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace broadhead::sm80
