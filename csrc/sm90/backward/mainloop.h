// What the consumer warpgroups of both Hopper backward kernels do with 64 rows of S and dP.
//
// A lane holds two rows of a 64 x kCols product, two columns of each eight: common/accumulator.h.
#pragma once

#include "common/accumulator.h"
#include "common/ldmatrix.h"
#include "common/tile_state.h"
#include "sm90/backward/load.h"
#include "sm90/consumer.h"
#include "sm90/wgmma.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
using Scores = float[Traits::kColTiles][4];

// P or dS as operand A: neighbouring accumulators, packed.
template <class Traits>
using Weights = std::uint32_t[Traits::kWeightSteps][4];

// Uniform in a warp, and the compiler should know it. 0 or 1.
BROADHEAD_DEVICE int consumer_warpgroup() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
}

// The lane's first row of the warpgroup's 64.
BROADHEAD_DEVICE int lane_row(unsigned thread = fresh_thread()) { return thread / 32 % 4 * 16 + thread % 32 / 4; }

// The lane's first column of each eight.
BROADHEAD_DEVICE int lane_col(unsigned thread = fresh_thread()) { return thread % 4 * 2; }

// A warp has done with what the barrier stands for.
BROADHEAD_DEVICE void release(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier.arrive();
}

// Clears the rows of a tile for which `dead(row)` holds, shared out over the warps. All consumers call it, and meet
// before any of them lets wgmma read the tile.
template <class Layout, int kRows, class Dead>
BROADHEAD_DEVICE void clear_together(void* tile, const Dead& dead) {
  clear_where<Layout, kRows>(tile, (fresh_thread() - 128) / 32, 8, dead);
  cutlass::arch::fence_view_async_shared();
  NamedBarrier::sync(256, hardware_id(kClearBarrier));
}

// Where the lane finds its row of a 16 x 16 matrix, of the warp's rows and 16 columns from 16 * step on, for ldmatrix.
// `tile`: rows in subtiles of 64 columns; the warpgroup's begin at `first_row`.
template <class Layout>
BROADHEAD_DEVICE std::uint32_t matrix_of(const void* tile, int first_row, int step) {
  const int lane = fresh_thread() % 32;
  const int row = first_row + fresh_thread() / 32 % 4 * 16 + lane % 16;
  return smem_address(tile) + step / 4 * Layout::kSubtileStride + row * Layout::kRowBytes +
         ((step % 4 * 2 + lane / 16) ^ (row % 8)) * 16;
}

struct NoMore {
  BROADHEAD_DEVICE void operator()() const {}
};

// Issues s = rows x columns^T over kDim of head_dim: 64 rows from `first_row` on, and all columns of a stage. The rows'
// first kKept steps are operand A from registers. `more()` issues what else is added.
template <class Rows, class Cols, int kDim, int kKept = 0, class Element, int kColTiles, class More = NoMore>
BROADHEAD_DEVICE void issue_scores(float (&s)[kColTiles][4], const Element* rows, int first_row, const Element* cols,
                                   const std::uint32_t (*kept)[4] = nullptr, const More& more = {}) {
  using Descriptor = MatrixDescriptor<Rows::kRowBytes>;
  const std::uint64_t a = Descriptor::make(smem_address(rows) + first_row * Rows::kRowBytes, 0, Rows::kSlabStride);
  const std::uint64_t b = Descriptor::make(smem_address(cols), 0, Cols::kSlabStride);
  clear_accumulators(s);  // tells the compiler that they hold nothing of use: the first wgmma does not accumulate
  cute::warpgroup_arrive();
  BROADHEAD_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    const std::uint64_t b_step = b + (Cols::step_offset(step, Cols::kSubtileStride) >> 4);
    if (step < kKept) {
      wgmma_rs<Element, 8 * kColTiles, Major::K>(s, kept[step], b_step, step > 0);
    } else {
      wgmma_ss<Element, 8 * kColTiles, Major::K>(s, a + (Rows::step_offset(step, Rows::kSubtileStride) >> 4), b_step,
                                                 step > 0);
    }
  }
  more();
  cute::warpgroup_commit_batch();
  fence_registers(s);
}

// Issues gradient += weights x columns over all columns of a stage.
template <class Cols, class Element, int kTiles, int kSteps>
BROADHEAD_DEVICE void issue_gradient(float (&gradient)[kTiles][4], std::uint32_t (&weights)[kSteps][4],
                                     const Element* cols) {
  fence_registers(gradient);
  fence_registers(weights);
  const std::uint64_t b =
      MatrixDescriptor<Cols::kRowBytes>::make(smem_address(cols), Cols::kSubtileStride, Cols::kSlabStride);
  cute::warpgroup_arrive();
  BROADHEAD_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    wgmma_rs<Element, 8 * kTiles, Major::MN>(gradient, weights[step], b + (step * 2 * Cols::kSlabStride >> 4), true);
  }
  cute::warpgroup_commit_batch();
  fence_registers(gradient);
}

// Masks of a step: `word(i, w)` has a bit for each of 32 columns, from the lane's first of column tile 4 w on, that its
// row `i` (of two) meets. PERF: a word is made where it is used, as a step has no registers for all of them.
struct NoMask {
  static constexpr bool kHides = false;
};

// The mask of the lane's key `row` of the tile and the one eight below, and the queries from `first_col` on. `seen`:
// the queries that see each key of the tile by their positions; `given`: store_given.
template <int kCols>
struct KeyMask {
  static constexpr bool kHides = true;
  int begin[2];
  int end[2];
  const std::uint32_t* given;  // of the first row; null: no query of the step has a range with a key of the tile

  BROADHEAD_DEVICE KeyMask(const BackwardWork& work, const QueryInterval* seen,
                           const std::uint32_t (*given_words)[kCols / 32], int row, int first_col)
      : given(meets_given(work, first_col, kCols) ? given_words[row] : nullptr) {
    const int col = first_col + lane_col();
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int2 interval = *reinterpret_cast<const int2*>(seen + row + 8 * i);
      begin[i] = interval.x - col;
      end[i] = interval.y - col;
    }
  }

  BROADHEAD_DEVICE std::uint32_t word(int i, int w) const {
    std::uint32_t bits = bits_between(begin[i] - 32 * w, end[i] - 32 * w);
    if (given != nullptr) bits |= given[8 * i * (kCols / 32) + w] >> lane_col();
    return bits;
  }
};

// The mask of the lane's query `row` of the sequence and the one eight below, and the keys from `first_col` on.
struct QueryMask {
  static constexpr bool kHides = true;
  const AttentionMask& mask;
  int row;
  int col;
  KeyInterval seen[2];

  BROADHEAD_DEVICE QueryMask(const AttentionMask& mask_, int row_, int first_col)
      : mask(mask_),
        row(row_),
        col(first_col + lane_col()),
        seen{mask_.row_interval(row_), mask_.row_interval(row_ + 8)} {}

  BROADHEAD_DEVICE std::uint32_t word(int i, int w) const { return mask.row_word(row + 8 * i, seen[i], col + 32 * w); }
};

// Packs the four numbers of column tile `n` of operand A.
template <class Element, int kSteps>
BROADHEAD_DEVICE void pack_tile(std::uint32_t (&weights)[kSteps][4], int n, const float (&x)[4]) {
  weights[n / 2][n % 2 * 2] = pack_pair<Element>(x[0], x[1]);
  weights[n / 2][n % 2 * 2 + 1] = pack_pair<Element>(x[2], x[3]);
}

// Weights by the column tile, as `differentiate` takes them: accumulators, or packed.
template <int kColTiles>
struct AccumulatedWeights {
  const float (&of_tile)[kColTiles][4];
  BROADHEAD_DEVICE float4 operator()(int n) const {
    return make_float4(of_tile[n][0], of_tile[n][1], of_tile[n][2], of_tile[n][3]);
  }
};

template <class Element, int kSteps>
struct PackedWeights {
  const std::uint32_t (&packed)[kSteps][4];
  BROADHEAD_DEVICE float4 operator()(int n) const {
    const float2 upper = unpack_pair<Element>(packed[n / 2][n % 2 * 2]);
    const float2 lower = unpack_pair<Element>(packed[n / 2][n % 2 * 2 + 1]);
    return make_float4(upper.x, upper.y, lower.x, lower.y);
  }
};

// The LSE or the D of the queries of a lane's numbers. Keys: those of each column tile, from shared memory, the first
// kEarly ahead of time. kPairs: of two tiles in one load. PERF(H200): while wgmma reads its operands there a load takes
// some 100 clocks. Pairs: 564 -> 583 TFLOP/s at head_dim 128 causal, but 456 -> 450 at 64, for want of registers.
template <int kEarly = 0, bool kPairs = true>
struct ColumnStats {
  static_assert(kEarly % 2 == 0);
  const float* of_lane;
  float2 early[max_int(kEarly, 1)];

  // `of_stage`: as stat_place says. `col`: lane_col().
  BROADHEAD_DEVICE ColumnStats(const float* of_stage, int col) : of_lane(of_stage + stat_place<kPairs>(col)) {
    BROADHEAD_UNROLL
    for (int n = 0; n < kEarly; ++n) early[n] = load(n);
  }
  BROADHEAD_DEVICE float2 load(int n) const {
    if constexpr (!kPairs) return *reinterpret_cast<const float2*>(of_lane + n * 8);
    const float4 four = *reinterpret_cast<const float4*>(of_lane + n / 2 * 16);
    return n % 2 == 0 ? make_float2(four.x, four.y) : make_float2(four.z, four.w);
  }
  BROADHEAD_DEVICE void read(int n, float (&x)[4]) const {
    const float2 two = n < kEarly ? early[n] : load(n);
    x[0] = x[2] = two.x;
    x[1] = x[3] = two.y;
  }
};

// D is in dP already.
struct NoStats {
  BROADHEAD_DEVICE NoStats(const float*, int) {}
  BROADHEAD_DEVICE void read(int, float (&x)[4]) const { x[0] = x[1] = x[2] = x[3] = 0.f; }
};

// Queries: those of its two rows.
struct RowStats {
  float of_row[2];
  BROADHEAD_DEVICE void read(int, float (&x)[4]) const {
    x[0] = x[1] = of_row[0];
    x[2] = x[3] = of_row[1];
  }
};

// P = exp(scale S - LSE), in place, and packed where kPack; with a softcap (kCapped) P in place is multiplied by its
// slope, as dS asks.
template <class Element, bool kPack, bool kCapped, int kColTiles, int kSteps, class Stats, class Mask>
BROADHEAD_DEVICE void exponentiate(float (&s)[kColTiles][4], std::uint32_t (&p)[kSteps][4], const Stats& lse,
                                   const ScoreScale& scale, const Mask& mask) {
  const float factor = kCapped ? kLog2e : scale.inner * kLog2e;
  const float inverse_cap = kCapped ? 1.f / scale.softcap : 0.f;
  std::uint32_t seen[2];
  BROADHEAD_UNROLL
  for (int n = 0; n < kColTiles; ++n) {
    float of_query[4], x[4];
    lse.read(n, of_query);
    if constexpr (Mask::kHides) {
      if (n % 4 == 0) seen[0] = mask.word(0, n / 4), seen[1] = mask.word(1, n / 4);
    }
    BROADHEAD_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float score = kCapped ? scale.cap(s[n][c]) : s[n][c];
      const bool hidden = Mask::kHides && ((seen[c / 2] >> (n % 4 * 8 + c % 2)) & 1) == 0;
      x[c] = exp2_approx(hidden ? -INFINITY : fmaf(score, factor, -of_query[c]));
      if constexpr (kCapped) {
        const float t = score * inverse_cap;
        s[n][c] = x[c] * fmaxf(1.f - t * t, 0.f);  // 0 where t is NaN, which only hidden scores are
      } else {
        s[n][c] = x[c];
      }
    }
    if constexpr (kPack) pack_tile<Element>(p, n, x);
  }
}

// The same of a step: `whole` where every row meets every column, else by `make_mask()`.
template <class Traits, bool kPack, class Stats, class MakeMask>
BROADHEAD_DEVICE void exponentiate_step(Scores<Traits>& s, Weights<Traits>& p, const Stats& lse,
                                        const ScoreScale& scale, bool whole, const MakeMask& make_mask) {
  using Element = typename Traits::Element;
  if (!Traits::kCapped && whole) {
    exponentiate<Element, kPack, Traits::kCapped>(s, p, lse, scale, NoMask{});
  } else {
    exponentiate<Element, kPack, Traits::kCapped>(s, p, lse, scale, make_mask());
  }
}

// dS = P (dP - D), packed. `p`: what exponentiate leaves in place, by a function of the column tile. `whole`: every row
// meets every column; else dP may be NaN where P is 0.
template <class Element, int kColTiles, int kSteps, class Probabilities, class Stats>
BROADHEAD_DEVICE void differentiate(std::uint32_t (&ds)[kSteps][4], const Probabilities& p,
                                    const float (&dp)[kColTiles][4], const Stats& delta, bool whole) {
  const auto each = [&](const auto& multiply) {
    BROADHEAD_UNROLL
    for (int n = 0; n < kColTiles; ++n) {
      float of_query[4], x[4];
      delta.read(n, of_query);
      const float4 weight = p(n);
      const float weights[4] = {weight.x, weight.y, weight.z, weight.w};
      BROADHEAD_UNROLL
      for (int c = 0; c < 4; ++c) x[c] = multiply(weights[c], dp[n][c] - of_query[c]);
      pack_tile<Element>(ds, n, x);
    }
  };
  if (whole) {
    each([](float weight, float x) { return weight * x; });
  } else {
    each([](float weight, float x) { return weight == 0.f ? 0.f : weight * x; });
  }
}

// dS = P dP in products of 16 bits: D has been taken from dP, and every row meets every column. PERF: a quarter of the
// instructions. Of bf16 alone, whose exponents hold whatever dP is.
template <int kColTiles, int kSteps>
BROADHEAD_DEVICE void multiply_packed(std::uint32_t (&ds)[kSteps][4], const std::uint32_t (&p)[kSteps][4],
                                      const float (&dp)[kColTiles][4]) {
  const auto pair = [](std::uint32_t x) {
    __nv_bfloat162 y;
    memcpy(&y, &x, sizeof(x));
    return y;
  };
  BROADHEAD_UNROLL
  for (int n = 0; n < kColTiles; ++n) {
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int at = n % 2 * 2 + i;
      const __nv_bfloat162 product =
          __hmul2_rn(pair(p[n / 2][at]), pair(pack_pair<cutlass::bfloat16_t>(dp[n][2 * i], dp[n][2 * i + 1])));
      memcpy(&ds[n / 2][at], &product, sizeof(product));
    }
  }
}

}  // namespace broadhead::sm90
