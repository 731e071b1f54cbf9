// What happens to raw scores before the softmax: softcap (or a scale that is not positive), the mask, missing pages.
#pragma once

#include "common/tile_state.h"

namespace broadhead {

// Scores of the scale and softcap of a tile; only where scale.transform.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void transform_scores(float (&s)[kMmaM][kMmaN][4], const ScoreScale& scale) {
  BROADHEAD_UNROLL
  for (int m = 0; m < kMmaM; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      BROADHEAD_UNROLL
      for (int c = 0; c < 4; ++c) s[m][n][c] = scale.apply(s[m][n][c]);
    }
  }
}

// Of row i of the lane sets what is not seen to -inf: seen are keys below `prefix` and those of [begin, end), all
// relative to the lane's first key, so that they are compared with constants.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void hide_keys(float (&s)[kMmaM][kMmaN][4], int i, int prefix, int begin, int end) {
  const int m = i / 2, c = (i % 2) * 2;
  BROADHEAD_UNROLL
  for (int n = 0; n < kMmaN; ++n) {
    if (n * 8 >= prefix && (n * 8 < begin || n * 8 >= end)) s[m][n][c] = -INFINITY;
    if (n * 8 + 1 >= prefix && (n * 8 + 1 < begin || n * 8 + 1 >= end)) s[m][n][c + 1] = -INFINITY;
  }
}

// The token of row i of the lane.
BROADHEAD_DEVICE int lane_token(const RowMap& rows, int warp_row, int i, int lane) {
  return rows.token(warp_row + i / 2 * 16 + (i % 2) * 8 + lane / 4);
}

// apply_mask where only the upper end cuts: the diagonal of a causal mask, or the end of the sequence.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void apply_end(float (&s)[kMmaM][kMmaN][4], const AttentionMask& mask, const RowMap& rows,
                                int warp_row, int key0, int lane) {
  if (mask.row_interval(rows.token(warp_row)).end >= key0 + 8 * kMmaN) return;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * kMmaM; ++i) {
    const int m = i / 2, c = (i % 2) * 2;
    const int live = mask.row_interval(lane_token(rows, warp_row, i, lane)).end - key0 - (lane % 4) * 2;
    BROADHEAD_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      if (n * 8 >= live) s[m][n][c] = -INFINITY;
      if (n * 8 + 1 >= live) s[m][n][c + 1] = -INFINITY;
    }
  }
}

BROADHEAD_DEVICE bool only_end_cuts(const AttentionMask& mask, const KeyInterval& unmasked, int key0) {
  return mask.prefix_len == 0 && key0 >= unmasked.begin;
}

// Sets what a query does not see of the warp's keys, 8 * kMmaN from key0 on, to -inf. Lane layout as in OnlineSoftmax.
// `unmasked`: the keys that every row of the tile sees.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void apply_mask(float (&s)[kMmaM][kMmaN][4], const AttentionMask& mask, const KeyInterval& unmasked,
                                 const RowMap& rows, int warp_row, int key0, int lane) {
  if (only_end_cuts(mask, unmasked, key0)) return apply_end(s, mask, rows, warp_row, key0, lane);
  const int first_key = key0 + (lane % 4) * 2;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * kMmaM; ++i) {
    const KeyInterval row = mask.row_interval(lane_token(rows, warp_row, i, lane));
    hide_keys(s, i, mask.prefix_len - first_key, row.begin - first_key, row.end - first_key);
  }
}

// The pages that hold `keys` keys of a sequence from key0 on, in order.
class PageWalk {
  const AttnParams& params_;
  const std::int32_t* entry_;
  int first_;  // key of the page, counted from key0
  int end_;    // of the keys that there are

 public:
  BROADHEAD_DEVICE PageWalk(const AttnParams& params, const KeyPages& pages, int key0, int keys) : params_(params) {
    const int entry = static_cast<unsigned>(pages.leftpad + key0) / static_cast<unsigned>(params.page_size);
    entry_ = pages.table + entry;
    first_ = entry * params.page_size - pages.leftpad - key0;
    end_ = min_int(keys, pages.seqlen_k - key0);
  }

  // Goes to the next page that the pool does not have; `keys`: its keys, counted from key0.
  BROADHEAD_DEVICE bool next_lost(KeyInterval& keys) {
#pragma unroll 1
    while (first_ < end_) {
      const bool lost = !page_exists(params_, *entry_++);
      keys = {first_, first_ + params_.page_size};
      first_ = keys.end;
      if (lost) return true;
    }
    return false;
  }
};

// apply_mask, and where `lost` also keys that do not exist because their page does not, page by page. One copy of the
// comparisons serves both: a second one makes ptxas spill registers in the largest Hopper kernels.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void apply_mask_and_pages(float (&s)[kMmaM][kMmaN][4], const AttnParams& params,
                                           const AttentionMask& mask, const KeyInterval& unmasked, const RowMap& rows,
                                           int warp_row, int key0, int lane, bool lost, const KeyPages& pages) {
  if (!lost && only_end_cuts(mask, unmasked, key0)) return apply_end(s, mask, rows, warp_row, key0, lane);
  const int lane_key = (lane % 4) * 2;
  const int first_key = key0 + lane_key;
  PageWalk walk(params, pages, key0, lost ? 8 * kMmaN : 0);
  KeyInterval page{0, 0};
  bool by_rows = true;
#pragma unroll 1
  do {
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * kMmaM; ++i) {
      // Seen but for a page: the keys below it and those from its end on.
      int prefix = page.begin - lane_key, begin = page.end - lane_key, end = INT32_MAX;
      if (by_rows) {
        const KeyInterval row = mask.row_interval(lane_token(rows, warp_row, i, lane));
        prefix = mask.prefix_len - first_key;
        begin = row.begin - first_key;
        end = row.end - first_key;
      }
      hide_keys(s, i, prefix, begin, end);
    }
    by_rows = false;
  } while (walk.next_lost(page));
}

// Sets scores of keys that do not exist to -inf. All lanes of a warp, for the block of 8 * kMmaN keys from key0 on of
// which some may be lost: the table is read again, a key a lane.
template <int kMmaM, int kMmaN>
BROADHEAD_DEVICE void hide_lost_keys(float (&s)[kMmaM][kMmaN][4], const AttnParams& params, const KeyPages& pages,
                                     int key0, int lane) {
  static_assert(kMmaN <= 32);
  std::uint32_t lost[2] = {0, 0};  // bit n: the lane's first and second key of tile n
#pragma unroll 1
  for (int n = 0; n < kMmaN; n += 4) {
    const std::uint32_t keys = __ballot_sync(0xffffffffu, pages.lost(params, key0 + n * 8 + lane)) >> (lane % 4 * 2);
    BROADHEAD_UNROLL
    for (int i = 0; i < 4; ++i) {
      lost[0] |= (keys >> (i * 8) & 1) << (n + i);
      lost[1] |= (keys >> (i * 8 + 1) & 1) << (n + i);
    }
  }
  BROADHEAD_UNROLL
  for (int n = 0; n < kMmaN; ++n) {
    BROADHEAD_UNROLL
    for (int c = 0; c < 2; ++c) {
      if ((lost[c] >> n & 1) == 0) continue;
      BROADHEAD_UNROLL
      for (int m = 0; m < kMmaM; ++m) s[m][n][c] = s[m][n][c + 2] = -INFINITY;
    }
  }
}

}  // namespace broadhead
