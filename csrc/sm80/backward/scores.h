// From S and dP to P and dS, with the mask and the softcap:
//   P = exp(scale S - LSE);  dS = P (dP - D), times the derivative of the softcap. The scale joins dQ and dK at the
//   end.
//
// Each function exists with and without a mask, and with and without a softcap: a step takes the one that it needs.
#pragma once

#include "common/given_bits.h"
#include "sm80/backward/mainloop.h"

namespace broadhead::sm80 {

// What the lane's rows see in a step: `row(m, half)` is of row 8 * half of row tile m, and its `word(n)` has a bit for
// each of 32 columns, from the lane's first of column tile n on, a multiple of 4.
struct WholeStep {
  struct Row {
    BROADHEAD_DEVICE std::uint32_t word(int) const { return 0xffffffffu; }
  };
  BROADHEAD_DEVICE Row row(int, int) const { return {}; }
};

// Columns [begin, end), relative to the lane's first one.
struct ColumnRow {
  int begin;
  int end;

  BROADHEAD_DEVICE std::uint32_t word(int n) const { return bits_between(begin - n * 8, end - n * 8); }
};

// And those below `prefix`.
struct PrefixRow {
  ColumnRow columns;
  int prefix;

  BROADHEAD_DEVICE std::uint32_t word(int n) const { return columns.word(n) | bits_below(prefix - n * 8); }
};

// A row whose words the step makes where they are used.
template <class Step>
struct LateRow {
  const Step* step;
  int m;
  int half;

  BROADHEAD_DEVICE std::uint32_t word(int n) const { return step->word(m, half, n); }
};

// Whether a word shows column `c` of column tile `n`: a constant place.
BROADHEAD_DEVICE bool shows(std::uint32_t word, int n, int c) { return ((word >> (n % 4 * 8 + c)) & 1) != 0; }

// Masks by position and the prefix.
template <class Traits>
struct MaskedStep {
  const BackwardState& state;
  const WarpPlace& place;
  int lane_col;

  BROADHEAD_DEVICE auto row(int m, int half) const {
    compile_barrier();  // what is known of all rows at once takes too many registers
    const int row = state.first_row + tile_row<Traits>(place, m, 2 * half);
    if constexpr (Traits::kKeys) {
      const QueryInterval seen = state.mask.query_interval(row, row);  // it knows of the prefix
      return ColumnRow{seen.begin - lane_col, seen.end - lane_col};
    } else {
      const KeyInterval seen = state.mask.row_interval(row);
      return PrefixRow{{seen.begin - lane_col, seen.end - lane_col}, state.mask.prefix_len - lane_col};
    }
  }
};

// The word of key `row` of the sequence with ranges: `seen` are the queries that see it by their positions.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t key_word(const BackwardState& state, const QueryInterval& seen, int row, int col) {
  std::uint32_t word = bits_between(seen.begin - col, seen.end - col);
  const int lane = fresh_thread() % 32, first_col = col - lane % 4 * 2;
  if (first_col < state.given_queries.end && first_col + 32 > state.given_queries.begin) {
    word |= given_bits(state.mask, first_col, row - lane / 4) >> (lane % 4 * 2);
  }
  return word;
}

// And by ranges. PERF: a word is made where it is used, as a warp has no registers for all of them; steps that no range
// touches have none of this code.
template <class Traits>
struct GivenStep {
  const BackwardState& state;
  const WarpPlace& place;
  int lane_col;

  BROADHEAD_DEVICE std::uint32_t word(int m, int half, int n) const {
    compile_barrier();
    const int row = state.first_row + tile_row<Traits>(place, m, 2 * half), col = lane_col + n * 8;
    if constexpr (Traits::kKeys) {
      return key_word<Traits>(state, state.mask.query_interval(row, row), row, col);
    } else {
      return state.mask.row_word(row, state.mask.row_interval(row), col);
    }
  }
  BROADHEAD_DEVICE LateRow<GivenStep> row(int m, int half) const { return {this, m, half}; }
};

// Whether some row may see a column of the step that begins at `first_col` by a range.
template <class Traits>
BROADHEAD_DEVICE bool meets_given(const BackwardState& state, int first_col) {
  if constexpr (!Traits::kKeys) return state.mask.kind != Given::kNone;
  return first_col < state.given_queries.end && first_col + Traits::kCols > state.given_queries.begin;
}

// Whether every row sees all columns of the step that begins at `first_col`.
template <class Traits>
BROADHEAD_DEVICE bool is_whole(const BackwardState& state, int first_col) {
  return first_col >= state.whole.begin && first_col + Traits::kCols <= state.whole.end;
}

// Calls `work` with what the rows see.
template <class Traits, class Work>
BROADHEAD_DEVICE void with_mask(const BackwardState& state, int first_col, const WarpPlace& place, const Work& work) {
  if (is_whole<Traits>(state, first_col)) {
    work(WholeStep{});
  } else if (__builtin_expect(meets_given<Traits>(state, first_col), 0)) {
    work(GivenStep<Traits>{state, place, first_col + tile_col<Traits>(place, 0)});
  } else {
    work(MaskedStep<Traits>{state, place, first_col + tile_col<Traits>(place, 0)});
  }
}

// P of a score, and the derivative of its softcap. `lse` in units of log2(e).
template <bool kCapped_>
struct Weigh {
  static constexpr bool kCapped = kCapped_;
  const ScoreScale& scale;
  float factor;
  float inverse_cap;

  BROADHEAD_DEVICE explicit Weigh(const BackwardState& state)
      : scale(state.scale),
        factor(kCapped ? kLog2e : state.scale.inner * kLog2e),
        inverse_cap(kCapped ? state.inverse_softcap : 0.f) {}

  BROADHEAD_DEVICE float operator()(float s, float lse, float& slope) const {
    slope = 1.f;
    if constexpr (kCapped) {
      s = scale.cap(s);
      const float t = s * inverse_cap;
      slope = 1.f - t * t;
    }
    return exp2_approx(fmaf(s, factor, -lse));
  }
};

template <class Work>
BROADHEAD_DEVICE void with_softcap(const BackwardState& state, const Work& work) {
  if (state.scale.softcap > 0.f) {
    work(Weigh<true>(state));
  } else {
    work(Weigh<false>(state));
  }
}

// LSE of a query as Weigh takes it. A query without keys gets +inf, so that its P is 0.
BROADHEAD_DEVICE float weigh_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

// Both S and dP in a warp: `dp` becomes dS. `lse`, `delta`: of the queries of the tile. It works row after row, as what
// is known of one takes registers.
template <class Traits, class Step>
BROADHEAD_DEVICE void differentiate(const Scores<Traits>& s, Scores<Traits>& dp, const Step& step, float factor,
                                    const float* lse, const float* delta, const WarpPlace& place) {
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    BROADHEAD_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto of_row = step.row(m, half);
      std::uint32_t seen = 0;
      const int row = tile_row<Traits>(place, m, 2 * half);
      const float of_lse = weigh_lse(lse[row]), of_delta = delta[row];
      BROADHEAD_UNROLL
      for (int n = 0; n < Traits::kColTiles; ++n) {
        if (n % 4 == 0) seen = of_row.word(n);
        BROADHEAD_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& element = dp[m][n][2 * half + c];
          const float ds = exp2_approx(fmaf(s[m][n][2 * half + c], factor, -of_lse)) * (element - of_delta);
          element = shows(seen, n, c) ? ds : 0.f;  // not a product with 0: what is not seen may be NaN
        }
      }
    }
  }
}

// Ahead of `differentiate`, where there is a softcap: `s` becomes the capped score, and `dp` what makes dS of P:
// (dP - D) times the slope, plus D.
template <class Traits>
BROADHEAD_DEVICE void cap_scores(Scores<Traits>& s, Scores<Traits>& dp, const BackwardState& state, const float* delta,
                                 const WarpPlace& place) {
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    BROADHEAD_UNROLL
    for (int half = 0; half < 2; ++half) {
      compile_barrier();
      const float of_delta = delta[tile_row<Traits>(place, m, 2 * half)];
      BROADHEAD_UNROLL
      for (int n = 0; n < Traits::kColTiles; ++n) {
        BROADHEAD_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& element = s[m][n][2 * half + c];
          float& of_dp = dp[m][n][2 * half + c];
          element = state.scale.cap(element);
          const float t = element * state.inverse_softcap;
          of_dp = fmaf(of_dp - of_delta, 1.f - t * t, of_delta);
        }
      }
    }
  }
}

// The first of two roles: `s` becomes P, and P times the slope goes to `handed`. `keep(m, n, words)` gets P of row tile
// m and column tiles n and on. `lse`: of the step's queries.
template <class Traits, class Step, class W, class Keep>
BROADHEAD_DEVICE void weigh_scores(Scores<Traits>& s, const Step& step, const W& weigh, const float* lse, uint4* handed,
                                   const Keep& keep, const WarpPlace& place) {
  using Element = typename Traits::Element;
  using Fragment = OwnFragment<Traits>;
  constexpr int kTiles = Fragment::kTiles;
  struct {
    decltype(step.row(0, 0)) half[2];
  } rows[Traits::kRowTiles];
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) rows[m] = {{step.row(m, 0), step.row(m, 1)}};
  std::uint32_t seen[Traits::kRowTiles][2];
  float2 next[kTiles];  // LSE of what comes next: on its way while this is worked on
  const auto load_next = [&](int n) {
    BROADHEAD_UNROLL
    for (int t = 0; t < kTiles; ++t) next[t] = *reinterpret_cast<const float2*>(lse + tile_col<Traits>(place, n + t));
  };
  load_next(0);
  BROADHEAD_UNROLL
  for (int n = 0; n < Traits::kColTiles; n += kTiles) {
    float of_query[kTiles][2];
    BROADHEAD_UNROLL
    for (int t = 0; t < kTiles; ++t) of_query[t][0] = weigh_lse(next[t].x), of_query[t][1] = weigh_lse(next[t].y);
    if (n + kTiles < Traits::kColTiles) load_next(n + kTiles);
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      if (n % 4 == 0) seen[m][0] = rows[m].half[0].word(n), seen[m][1] = rows[m].half[1].word(n);
      std::uint32_t p[2 * kTiles], with_slope[2 * kTiles];
      BROADHEAD_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        float y[2];
        BROADHEAD_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& element = s[m][n + i / 2][i % 2 * 2 + c];
          float slope;
          const float x = weigh(element, of_query[i / 2][c], slope);
          element = shows(seen[m][i % 2], n + i / 2, c) ? x : 0.f;
          y[c] = element * slope;
        }
        p[i] = pack_pair<Element>(s[m][n + i / 2][i % 2 * 2], s[m][n + i / 2][i % 2 * 2 + 1]);
        with_slope[i] = pack_pair<Element>(y[0], y[1]);
      }
      Fragment::store(handed, place, m, n, with_slope);
      keep(m, n, p);
    }
  }
}

// The second role: `dp` becomes dS, by what the first one handed over. Where the row group shares dS, it takes that
// place. `delta`: D of the step's queries.
template <class Traits, class Step>
BROADHEAD_DEVICE void differentiate_scores(Scores<Traits>& dp, const Step& step, const float* delta, uint4* handed,
                                           const WarpPlace& place) {
  using Element = typename Traits::Element;
  using Fragment = OwnFragment<Traits>;
  constexpr int kTiles = Fragment::kTiles;
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    const decltype(step.row(0, 0)) rows[2] = {step.row(m, 0), step.row(m, 1)};
    std::uint32_t seen[2];
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kColTiles; n += kTiles) {
      if (n % 4 == 0) seen[0] = rows[0].word(n), seen[1] = rows[1].word(n);
      std::uint32_t words[2 * kTiles];
      Fragment::load(handed, place, m, n, words);
      BROADHEAD_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float2 p = unpack_pair<Element>(words[i]);
        const float2 of_query = *reinterpret_cast<const float2*>(delta + tile_col<Traits>(place, n + i / 2));
        float& first = dp[m][n + i / 2][i % 2 * 2];
        float& second = dp[m][n + i / 2][i % 2 * 2 + 1];
        first = p.x * (first - of_query.x);
        second = p.y * (second - of_query.y);
        // What is not seen may be NaN, and is not made 0 by a P of 0.
        first = shows(seen[i % 2], n + i / 2, 0) ? first : 0.f;
        second = shows(seen[i % 2], n + i / 2, 1) ? second : 0.f;
        words[i] = pack_pair<Element>(first, second);
      }
      if constexpr (Traits::kShares) Fragment::store(handed, place, m, n, words);
    }
  }
}

}  // namespace broadhead::sm80
