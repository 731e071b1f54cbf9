// Softmax of a warpgroup's n_blocks that looks for a new maximum only when it must.
//
// exp(S - reference) is computed with the reference of the n_blocks before. Only when a lane's sum says that something
// may have grown too large is the n_block's maximum found and, where it exceeds the reference, the reference raised to
// it and the n_block computed again: exact, because the last division cancels any reference. On random data this is the
// first n_blocks of a tile and little else. It saves 64 of 300 instructions a row, and two rounds of shuffles on the
// way from S to P. PERF(H200, head_dim 128 full: 651 -> 718 TFLOP/s)
//
// 8-bit P has three bits: there the reference is the exact maximum so far, so that the weight of a key that dominates
// its row is a power of two and not rounded. It is 2^8 there, so that weights down to 2^-17 of it are not lost; e4m3
// ends at 448.
//
// The conversion to e4m3 is PTX: with CUTLASS's the compiler orders the D128 kernel otherwise.
#pragma once

#include <cmath>

#include "common/online_softmax.h"

namespace broadhead::sm90 {

// Four numbers rounded to e4m3, the first in the lowest byte.
BROADHEAD_DEVICE std::uint32_t pack_e4m3(float a, float b, float c, float d) {
  std::uint32_t packed;
  asm("{\n"
      ".reg .b16 lo, hi;\n"
      "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
      "mov.b32 %0, {lo, hi};\n"
      "}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// A warpgroup's P of kKeyTiles x 8 keys as operand A of P V: neighbouring accumulators of S, packed.
template <class Element, int kKeyTiles>
using Probabilities = std::uint32_t[kKeyTiles * static_cast<int>(sizeof(Element)) / 4][4];

// Packs the numbers of row half `i` (0: upper eight rows) of key tiles n and n + 1.
template <class Element, int kKeyTiles>
BROADHEAD_DEVICE void pack_tiles(Probabilities<Element, kKeyTiles>& p, int n, int i, const float (&x)[4]) {
  if constexpr (sizeof(Element) == 1) {
    p[n / 4][n / 2 % 2 * 2 + i] = pack_e4m3(x[0], x[1], x[2], x[3]);
  } else {
    p[n / 2][i] = pack_pair<Element>(x[0], x[1]);
    p[n / 2][2 + i] = pack_pair<Element>(x[2], x[3]);
  }
}

// True for whatever arithmetic gives (a NaN of it has one pattern), which the compiler does not know.
BROADHEAD_DEVICE bool is_computed(float x) { return __any_sync(0xffffffffu, __float_as_uint(x) != 0x7fedcba9u); }

template <bool k8Bit>
struct BlockSoftmax : OnlineSoftmax<2> {
  static constexpr float kShift = k8Bit ? 8.f : 0.f;  // log2 of P at the reference
  // A lane's share of a row's sum over one n_block; P stays below it, within fp16.
  static constexpr float kLargestSum = 8192.f;
  // log2 of what P may exceed the reference by where a sum made us look.
  static constexpr float kLazySlack = 0.25f;

  BROADHEAD_DEVICE float offset(int i, float scale_log2) const {
    return row_max[i] == -INFINITY ? 0.f : row_max[i] * scale_log2 - kShift;
  }

  // P of the n_block from S, packed as A operand of wgmma; true when O must be multiplied by `factor` first.
  template <class Element, int kKeyTiles>
  BROADHEAD_DEVICE bool compute_p(Probabilities<Element, kKeyTiles>& p, const float (&s)[1][kKeyTiles][4],
                                  float scale_log2, float (&factor)[2], bool first) {
    float sum[2];
    if (!first) {
      // A row without a reference yet has offset -inf, and a sum that is infinite or NaN.
      const float offsets[2] = {row_max[0] * scale_log2 - kShift, row_max[1] * scale_log2 - kShift};
      compute<Element>(p, s, scale_log2, offsets, sum);
      if (!__any_sync(0xffffffffu, !(sum[0] <= kLargestSum) || !(sum[1] <= kLargestSum))) {
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
        return false;
      }
    }
    float found[2];
    block_max(s, found);
    const bool unset = row_max[0] == -INFINITY || row_max[1] == -INFINITY;
    const bool raised = raise(found, scale_log2, factor, first ? -INFINITY : kLazySlack);
    if (raised || __any_sync(0xffffffffu, unset)) {
      const float offsets[2] = {offset(0, scale_log2), offset(1, scale_log2)};
      compute<Element>(p, s, scale_log2, offsets, sum);
    }
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
    return raised;
  }

  template <class Element, int kKeyTiles>
  BROADHEAD_DEVICE static void compute(Probabilities<Element, kKeyTiles>& p, const float (&s)[1][kKeyTiles][4],
                                       float scale_log2, const float (&offset)[2], float (&sum)[2]) {
    sum[0] = sum[1] = 0.f;
    BROADHEAD_UNROLL
    for (int n = 0; n < kKeyTiles; n += 2) {
      BROADHEAD_UNROLL
      for (int i = 0; i < 2; ++i) {
        float x[4];
        BROADHEAD_UNROLL
        for (int c = 0; c < 4; ++c) {
          const float exponent = fmaf(s[0][n + c / 2][2 * i + c % 2], scale_log2, -offset[i]);
          x[c] = exp2_approx(exponent);
        }
        sum[i] += (x[0] + x[1]) + (x[2] + x[3]);
        pack_tiles<Element, kKeyTiles>(p, n, i, x);
      }
    }
  }

  // P of the n_block against the largest score so far. O must be multiplied by `factor` before this n_block's P V is
  // added.
  template <class Element, int kKeyTiles>
  BROADHEAD_DEVICE void compute_p_exactly(Probabilities<Element, kKeyTiles>& p, const float (&s)[1][kKeyTiles][4],
                                          float scale_log2, float (&factor)[2]) {
    float found[2], sum[2];
    block_max(s, found);
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float raised = fmaxf(row_max[i], found[i]);
      factor[i] = row_max[i] == -INFINITY ? 0.f : exp2_approx((row_max[i] - raised) * scale_log2);
      row_max[i] = raised;
    }
    const float offsets[2] = {offset(0, scale_log2), offset(1, scale_log2)};
    compute<Element>(p, s, scale_log2, offsets, sum);
    row_sum[0] = row_sum[0] * factor[0] + sum[0];
    row_sum[1] = row_sum[1] * factor[1] + sum[1];
  }
};

using LazySoftmax = BlockSoftmax<false>;

}  // namespace broadhead::sm90
