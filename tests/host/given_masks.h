// Masks that a call gives as values, of one sequence, with the extents that kernels/mask_extents.cu promises of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "common/attention_mask.h"

namespace host_test {

// Whether a range or a word of a tree shows `key` to query `q`: written out, for one key.
inline bool in_range(int begin, int end, int key, int seqlen_k, int position, bool in_window, int window_left) {
  if (begin < 0 || key < begin || key >= std::min(end, seqlen_k)) return false;
  return !in_window || window_left < 0 || key >= position - window_left;
}

struct GivenMasks {
  std::vector<std::int32_t> ranges;  // two of each query; empty: none
  std::vector<std::int64_t> tree;    // a word of each query; empty: none
  bool in_window = false;
  std::vector<broadhead::KeyInterval> query_extents;
  std::vector<broadhead::KeyExtent> key_extents;

  bool shows(int q, int key, int seqlen_q, int seqlen_k, int window_left) const {
    if (!tree.empty()) {
      const int bit = key - (seqlen_k - 64);
      return bit >= 0 && (static_cast<std::uint64_t>(tree[q]) >> bit & 1) != 0;
    }
    return !ranges.empty() &&
           in_range(ranges[2 * q], ranges[2 * q + 1], key, seqlen_k, q + seqlen_k - seqlen_q, in_window, window_left);
  }

  // What the device step finds, key by key and query by query.
  void find_extents(int seqlen_q, int seqlen_k, int window_left) {
    query_extents.assign((seqlen_q + 15) / 16, {0, 0});
    key_extents.assign((seqlen_k + 31) / 32, {0, INT32_MAX, 0});
    for (int q = 0; q < seqlen_q; ++q) {
      for (int key = 0; key < seqlen_k; ++key) {
        if (!shows(q, key, seqlen_q, seqlen_k, window_left)) continue;
        broadhead::KeyInterval& of_query = query_extents[q / 16];
        of_query = of_query.end == 0
                       ? broadhead::KeyInterval{key, key + 1}
                       : broadhead::KeyInterval{std::min(of_query.begin, key), std::max(of_query.end, key + 1)};
        broadhead::KeyExtent& of_key = key_extents[key / 32];
        of_key.live |= 1u << key % 32;
        if (tree.empty()) of_key = {of_key.live, std::min(of_key.q_begin, q), std::max(of_key.q_end, q + 1)};
      }
    }
  }

  void give_to(broadhead::AttentionMask& mask) const {
    using broadhead::Given;
    mask.kind = !tree.empty()    ? Given::kTree
                : ranges.empty() ? Given::kNone
                : in_window      ? Given::kRangesInWindow
                                 : Given::kRanges;
    mask.tree_keys = tree.empty() ? 0 : broadhead::kTreeKeys;
    mask.given = tree.empty() ? static_cast<const void*>(ranges.data()) : tree.data();
    mask.given_stride = tree.empty() ? 2 : 1;
  }

  broadhead::MaskExtents extents() const {
    return {ranges.empty() ? nullptr : query_extents.data(), key_extents.data()};
  }
};

// Ranges of which some are empty, end behind the keys, or lie together like the tokens of an image.
inline std::vector<std::int32_t> draw_ranges(int seqlen_q, int seqlen_k, std::mt19937& random) {
  const auto below = [&](int end) { return static_cast<int>(random() % static_cast<unsigned>(end + 1)); };
  std::vector<std::int32_t> ranges;
  for (int q = 0; q < seqlen_q; ++q) {
    const int kind = below(5);
    if (kind == 0) {
      ranges.insert(ranges.end(), {-below(2), 0});
    } else if (kind == 1 && q > 0) {
      ranges.insert(ranges.end(), {ranges[2 * q - 2], ranges[2 * q - 1]});
    } else if (kind == 4) {
      ranges.insert(ranges.end(), {below(3), INT32_MIN + below(1)});
    } else if (kind == 2) {
      ranges.insert(ranges.end(), {below(seqlen_k), INT32_MAX - below(1)});
    } else {
      const int begin = below(seqlen_k + 2) - 1;
      ranges.insert(ranges.end(), {begin, begin + below(9) - 1});
    }
  }
  return ranges;
}

}  // namespace host_test
