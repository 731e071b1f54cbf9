// What a fused kernel does beside the kernel that keeps keys: dS through shared memory, and dQ of a step.
#pragma once

#include "common/dq_sums.h"
#include "sm80/backward/scores.h"

namespace broadhead::sm80 {

// Which queries see each key of the tile, once a tile: each row divides 64-bit integers.
template <class Traits>
BROADHEAD_DEVICE void find_seen(typename Traits::SharedStorage& smem) {
  const BackwardState& state = smem.state;
  for (int row = fresh_thread(); row < Traits::kRows; row += Traits::kThreads) {
    const int key = state.first_row + row;
    smem.seen[row] = key < state.end_row ? state.mask.query_interval(key, key) : QueryInterval{0, 0};
  }
}

// What the lane's rows see in a step, as MaskedStep and GivenStep tell it.
template <class Traits, bool kGiven>
struct FoundStep {
  const BackwardState& state;
  const QueryInterval* seen;
  const WarpPlace& place;
  int lane_col;

  BROADHEAD_DEVICE std::uint32_t word(int m, int half, int n) const {
    if constexpr (kGiven) compile_barrier();
    const int row = tile_row<Traits>(place, m, 2 * half), col = lane_col + n * 8;
    if constexpr (kGiven) return key_word<Traits>(state, seen[row], state.first_row + row, col);
    return bits_between(seen[row].begin - col, seen[row].end - col);
  }
  BROADHEAD_DEVICE LateRow<FoundStep> row(int m, int half) const { return {this, m, half}; }
};

// Calls `work` with what the rows see.
template <class Traits, class Work>
BROADHEAD_DEVICE void with_found_mask(const typename Traits::SharedStorage& smem, int first_col, const WarpPlace& place,
                                      const Work& work) {
  const BackwardState& state = smem.state;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
  constexpr bool kGivenApart = Traits::kHeadDim > 64;  // PERF: code of its own for steps without ranges would spill
#else
  constexpr bool kGivenApart = true;
#endif
  if (is_whole<Traits>(state, first_col)) {
    work(WholeStep{});
  } else if (!kGivenApart || __builtin_expect(meets_given<Traits>(state, first_col), 0)) {
    work(FoundStep<Traits, true>{state, smem.seen, place, first_col + tile_col<Traits>(place, 0)});
  } else {
    work(FoundStep<Traits, false>{state, smem.seen, place, first_col + tile_col<Traits>(place, 0)});
  }
}

// Where unit `unit` (8 queries) of key `row` of row tile `row_tile` lies in a tile of dS, in bytes.
template <class Traits>
BROADHEAD_DEVICE int ds_offset(int row_tile, int row, int unit) {
  constexpr int kUnits = Traits::kDsUnits;
  const int swizzle = kUnits == 8 ? row & 7 : row / 2 & 3;
  return row_tile * (Traits::kCols * 32) + unit / kUnits * (kUnits * 256) + row * (kUnits * 16) +
         ((unit % kUnits ^ swizzle) * 16);
}

// P or dS of a warp as operands: [row tile][16 columns].
template <class Traits>
using Weights = std::uint32_t[Traits::kRowTiles][Traits::kColTiles / 2][4];

// The second role: from `dp` to dS, by what the first one handed over in `tile`. It takes that place as [key][query].
// `delta`: D of the step's queries.
template <class Traits, class Step>
BROADHEAD_DEVICE void differentiate_and_store(const Scores<Traits>& dp, Weights<Traits>& ds, const Step& step,
                                              const float* delta, void* tile, const WarpPlace& place) {
  using Element = typename Traits::Element;
  using Fragment = OwnFragment<Traits>;
  static_assert(Traits::kColTiles % 2 == 0);
  const int row = place.lane / 4;
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    std::uint32_t handed[Traits::kColTiles / 2][4];
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; n += 2) {
      Fragment::load(static_cast<const uint4*>(tile), place, m, n, handed[n / 2]);
    }
    __syncwarp();  // all lanes have read what is overwritten
    const int row_tile = place.warp_r * Traits::kRowTiles + m;
    const int of_row = ds_offset<Traits>(row_tile, row, place.warp_c * Traits::kColTiles) + place.lane % 4 * 4;
    std::uint32_t seen[2];
    const float* of_col = delta + tile_col<Traits>(place, 0);
    float2 next = *reinterpret_cast<const float2*>(of_col);
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; ++n) {
      if (n % 4 == 0) seen[0] = step.row(m, 0).word(n), seen[1] = step.row(m, 1).word(n);
      const float2 of_query = next;
      if (n + 1 < Traits::kColTiles) next = *reinterpret_cast<const float2*>(of_col + (n + 1) * 8);
      BROADHEAD_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float2 p = unpack_pair<Element>(handed[n / 2][n % 2 * 2 + half]);
        const float first = p.x * (dp[m][n][half * 2] - of_query.x);
        const float second = p.y * (dp[m][n][half * 2 + 1] - of_query.y);
        // What is not seen may be NaN, and is not made 0 by a P of 0.
        const std::uint32_t pair =
            pack_pair<Element>(shows(seen[half], n, 0) ? first : 0.f, shows(seen[half], n, 1) ? second : 0.f);
        ds[m][n / 2][n % 2 * 2 + half] = pair;
        const int at = (of_row ^ (n % Traits::kDsUnits * 16)) + n / Traits::kDsUnits * (Traits::kDsUnits * 256) +
                       half * (8 * Traits::kDsUnits * 16);
        *reinterpret_cast<std::uint32_t*>(static_cast<char*>(tile) + at) = pair;
      }
    }
  }
}

// The warp's own weights, for add_gradient.
template <class Traits>
BROADHEAD_DEVICE auto kept_weights(const Weights<Traits>& weights) {
  return [&weights](RowFragments<Traits>& a, int step) {
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      BROADHEAD_UNROLL
      for (int i = 0; i < 4; ++i) a[m][i] = weights[m][step][i];
    }
  };
}

// dS of the row group as operands, for add_gradient. `tile`: its address.
template <class Traits>
BROADHEAD_DEVICE auto shared_ds(std::uint32_t tile, const WarpPlace& place) {
  return [tile, &place](RowFragments<Traits>& a, int step) {
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      const int row_tile = place.warp_r * Traits::kRowTiles + m;
      ldmatrix_x4(a[m], tile + ds_offset<Traits>(row_tile, place.lane & 15, step * 2 + (place.lane >> 4)));
    }
  };
}

// The warp's part of dQ = dS K of a step, which it adds to `sums`, those of the step's queries. `ds`, `keys`: addresses
// of the tiles.
template <class Traits>
BROADHEAD_DEVICE void add_dq(std::uint32_t ds, std::uint32_t keys, float* sums, int thread) {
  using Element = typename Traits::Element;
  constexpr int kTiles = Traits::kDqColTiles;
  const int lane = thread % 32, warp = thread / 32;
  const int warp_r = warp / Traits::kDqWarpsC, warp_c = warp % Traits::kDqWarpsC;
  float dq[Traits::kDqRowTiles][kTiles][4];
  clear_accumulators(dq);
  // Rows of the transposed 8 x 8 matrices of A: keys 0-7 and 8-15, each of queries 0-7 and 8-15. Both addresses are
  // XORed with constants from here on.
  constexpr int kUnits = Traits::kDsUnits, kTileUnits = 2 * Traits::kDqRowTiles;  // of 8 queries: of a row, of the warp
  static_assert(kUnits % kTileUnits == 0 || kTileUnits % kUnits == 0);
  const std::uint32_t a_lane =
      ds + (ds_offset<Traits>(0, lane / 16 * 8 + lane % 8, warp_r * kTileUnits) ^ (lane / 8 % 2 * 16));
  constexpr int kAtOnce =
      (kTiles | 8) & -(kTiles | 8);  // tiles of B whose units differ from the first one's in low bits
  const int unit = warp_c * kTiles;
  const std::uint32_t b_lane = keys + (lane & 15) * 128;
  BROADHEAD_UNROLL
  for (int step = 0; step < Traits::kRows / 16; ++step) {
    std::uint32_t a[Traits::kDqRowTiles][4];
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kDqRowTiles; ++m) {
      ldmatrix_x4_trans(
          a[m], (a_lane ^ (m * 2 % kUnits * 16)) + m * 2 / kUnits * (kUnits * 256) + step * (Traits::kCols * 32));
    }
    BROADHEAD_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      const int first = unit + n / kAtOnce * kAtOnce;
      const std::uint32_t at = b_lane + first / 8 * (Traits::kRows * 128) + ((first % 8 ^ lane / 16 ^ (lane & 7)) * 16);
      std::uint32_t b[4];
      ldmatrix_x4_trans(b, (at ^ (n % kAtOnce * 16)) + step * (16 * 128));
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kDqRowTiles; ++m) {
        mma<Element>(dq[m][n], a[m], b[0], b[1]);
        mma<Element>(dq[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
  float* own = sums + Traits::DqSums::block(warp_r * Traits::kDqRowTiles, warp_c * kTiles) * kDqBlockFloats;
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kDqRowTiles; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      add_dq_block(own + Traits::DqSums::block(m, n) * kDqBlockFloats, lane, dq[m][n]);
    }
  }
}

}  // namespace broadhead::sm80
