// What happens to scores beside the products: scale and softcap, keys that do not exist, the mask.
#pragma once

#include <cmath>

#include "common/attention_mask.h"
#include "common/device.h"
#include "common/rows.h"
#include "host/params.h"

namespace broadhead {

// The softmax works on exp2(S * scale_log2 - max): a scale <= 0 would turn the maximum into a minimum, and softcap is
// not linear, so in both cases S is transformed first (`transform`) and the remaining scale is 1.
struct ScoreScale {
  float scale_log2;
  float scale;  // the scale that remains for the softmax, in natural units
  float softcap;
  float inner;  // softcap: scale / softcap; else scale
  bool transform;
  float v_factor;  // 8-bit V: its descale

  BROADHEAD_DEVICE void set(float softmax_scale, float softcap_) {
    // No score comes near the bound: it keeps `inner` a normal number where softcap is as large as "off".
    softcap = fminf(softcap_, 1e30f);
    transform = softcap > 0.f || !(softmax_scale > 0.f);
    scale = transform ? 1.f : softmax_scale;
    scale_log2 = scale * kLog2e;
    inner = softcap > 0.f ? softmax_scale / softcap : softmax_scale;
  }

  // For Q that was multiplied by `factor`, a power of two.
  BROADHEAD_DEVICE void divide(float factor) {
    const float inverse = 1.f / factor;
    inner *= inverse;
    if (transform) return;
    scale *= inverse;
    scale_log2 *= inverse;
  }

  // tanh(x) = 1 - 2 / (exp(2x) + 1), two special-function instructions. Its error is one of softcap, not of the score:
  // near 0, where a large softcap leaves all scores, x - x^3 / 3 is closer, so that the error is 3e-6 of the score
  // everywhere.
  BROADHEAD_DEVICE float cap(float s) const {
    const float x = s * inner;
    const float near = fmaf(x * x * x, -1.f / 3.f, x);
    const float far = 1.f - __fdividef(2.f, exp2_approx(2.f * kLog2e * x) + 1.f);
    return softcap * select_below(fabsf(x), 0.05f, near, far);
  }
};

// The factor of 8-bit q, k or v of one sequence and KV head; 1 when there are none.
BROADHEAD_DEVICE float descale(const float* factors, const DescaleStrides& strides, int batch, int kv_head) {
  return factors == nullptr ? 1.f : factors[batch * strides.batch + kv_head * strides.head];
}

// Sets the scores of keys that do not exist to -inf. `missing(n)` returns two bits, which are set where the lane's
// first and second key of tile n do not exist. Their K and V are filled with zeros.
// PERF: it is called where such a key was seen and nowhere else, right behind the QK GEMM, and changes S in place. S
// that began at -inf instead took a wgmma that always accumulates, and with it 100 instructions an n_block that wrote
// zeros (head_dim 128: 17 % slower, also without pages). Hiding these keys in apply_mask made many kernels spill.
template <int kMmaM, int kMmaN, class Missing>
BROADHEAD_DEVICE void hide_missing(float (&s)[kMmaM][kMmaN][4], const Missing& missing) {
  BROADHEAD_UNROLL
  for (int n = 0; n < kMmaN; ++n) {
    const std::uint32_t bits = missing(n);
    BROADHEAD_UNROLL
    for (int c = 0; c < 2; ++c) {
      if ((bits >> c) & 1) {
        BROADHEAD_UNROLL
        for (int m = 0; m < kMmaM; ++m) s[m][n][c] = s[m][n][c + 2] = -INFINITY;
      }
    }
  }
}

// The two bits that hide_missing asks for, from a bit mask of keys: `word` holds keys 32 * (n / 4) and on.
BROADHEAD_DEVICE std::uint32_t missing_pair(std::uint32_t word, int n) {
  return word >> threadIdx.x % 4 * 2 >> n % 4 * 8;  // one shift a word that depends on the lane; the rest are constants
}

// Applies scale and softcap to the scores; called only where scale.transform. A key that does not exist keeps its -inf.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void transform_scores(float (&s)[kMmaM][kMmaN][4], const ScoreScale& scale) {
  const auto each = [&](const auto& apply) {
    BROADHEAD_UNROLL
    for (int m = 0; m < kMmaM; ++m) {
      BROADHEAD_UNROLL
      for (int n = 0; n < kMmaN; ++n) {
        BROADHEAD_UNROLL
        for (int c = 0; c < 4; ++c) {
          s[m][n][c] = keep_minus_infinity(s[m][n][c], apply(s[m][n][c]));
        }
      }
    }
  };
  if (scale.softcap > 0.f) {
    each([&](float x) { return scale.cap(x); });
  } else {
    each([&](float x) { return x * scale.inner; });
  }
}

// Which of 8 * kMmaN keys from key0 on each row of a warp sees, a bit for each: words that the lanes hold for each
// other. PERF: lanes that each made those of their own rows would make them four times over, and in more registers than
// the wide kernels have.
template <int kMmaM, int kMmaN>
class RowWords {
  static constexpr int kRows = 16 * kMmaM, kPerRow = 32 / kRows;  // lanes that share the words of a row
  static constexpr int kHeld = ceil_div(ceil_div(kMmaN, 4), kPerRow);
  static_assert(kMmaM <= 2);
  std::uint32_t held_[kHeld];

 public:
  BROADHEAD_DEVICE RowWords(const AttentionMask& mask, const RowMap& rows, int warp_row, int key0, int lane) {
    const int token = rows.token(warp_row + lane % kRows);
    const KeyInterval row = mask.row_interval(token);
    const int first_key = key0 + 32 * (lane / kRows);
    BROADHEAD_UNROLL
    for (int k = 0; k < kHeld; ++k) held_[k] = mask.placed_word(row, first_key + 32 * k * kPerRow);
    if (__builtin_expect(mask.kind == Given::kNone, 1)) return;
    // PERF: one copy of this code, as most calls skip it.
#pragma unroll 1
    for (int k = 0; k < kHeld; ++k) {
      const std::uint32_t seen = mask.given_word(token, first_key + 32 * k * kPerRow);
      BROADHEAD_UNROLL
      for (int i = 0; i < kHeld; ++i) held_[i] |= i == k ? seen : 0u;
    }
  }

  // The word of row `row` of the warp and the 32 keys from key0 + 32 * word on. All lanes call it.
  BROADHEAD_DEVICE std::uint32_t get(int row, int word) const {
    return __shfl_sync(0xffffffffu, held_[word / kPerRow], row + word % kPerRow * kRows);
  }
};

// apply_mask for a plain call: each row sees one interval of keys.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void apply_plain_mask(float (&s)[kMmaM][kMmaN][4], const AttentionMask& mask, const RowMap& rows,
                                       int warp_row, int key0, int lane) {
  const int first_key = key0 + (lane % 4) * 2;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * kMmaM; ++i) {
    const int m = i / 2, c = (i % 2) * 2;
    const KeyInterval row = mask.row_interval(rows.token(warp_row + m * 16 + (i % 2) * 8 + lane / 4));
    const int begin = row.begin - first_key, end = row.end - first_key;
    BROADHEAD_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      if (n * 8 < begin || n * 8 >= end) s[m][n][c] = -INFINITY;
      if (n * 8 + 1 < begin || n * 8 + 1 >= end) s[m][n][c + 1] = -INFINITY;
    }
  }
}

// Sets the scores of keys that a query does not see to -inf. The warp holds 8 * kMmaN keys from key0 on, in the lane
// layout of OnlineSoftmax. `unmasked` are the keys that every row of the tile sees.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void apply_mask(float (&s)[kMmaM][kMmaN][4], const AttentionMask& mask, const KeyInterval& unmasked,
                                 const RowMap& rows, int warp_row, int key0, int lane) {
  if (mask.prefix_len == 0 && mask.kind == Given::kNone && key0 >= unmasked.begin) {
    // Only the upper end hides keys: the diagonal of a causal mask, or the end of the sequence.
    if (mask.row_interval(rows.token(warp_row)).end >= key0 + 8 * kMmaN) return;
    const int first_key = key0 + (lane % 4) * 2;
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * kMmaM; ++i) {
      const int m = i / 2, c = (i % 2) * 2;
      const int token = rows.token(warp_row + m * 16 + (i % 2) * 8 + lane / 4);
      const int live = mask.row_interval(token).end - first_key;
      BROADHEAD_UNROLL
      for (int n = 0; n < kMmaN; ++n) {
        if (n * 8 >= live) s[m][n][c] = -INFINITY;
        if (n * 8 + 1 >= live) s[m][n][c + 1] = -INFINITY;
      }
    }
    return;
  }
  const RowWords<kMmaM, kMmaN> words(mask, rows, warp_row, key0, lane);
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * kMmaM; ++i) {
    const int m = i / 2, c = (i % 2) * 2;
    BROADHEAD_UNROLL
    for (int n = 0; n < kMmaN; n += 4) {
      // What is tested are constant places.
      const std::uint32_t seen = words.get(m * 16 + (i % 2) * 8 + lane / 4, n / 4) >> (lane % 4 * 2);
      BROADHEAD_UNROLL
      for (int j = 0; j < 4 && n + j < kMmaN; ++j) {
        if ((seen >> (j * 8) & 1) == 0) s[m][n + j][c] = -INFINITY;
        if ((seen >> (j * 8 + 1) & 1) == 0) s[m][n + j][c + 1] = -INFINITY;
      }
    }
  }
}

}  // namespace broadhead
