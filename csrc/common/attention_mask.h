// Which keys a query sees. One object owns the block range and the per-element predicate, so they cannot disagree.
//
// Query i of a sequence sits at position p = i + seqlen_k - seqlen_q (bottom-right alignment). It sees the interval
// [p - window_left, p + window_right] within its attention_chunk, and every key below prefix_len.
#pragma once

#include "common/macros.h"
#include "common/math.h"
#include "host/params.h"

namespace broadhead {

struct KeyInterval {
  int begin;
  int end;  // exclusive; end <= begin: empty
};

struct QueryInterval {
  int begin;
  int end;  // exclusive; end <= begin: empty
};

struct AttentionMask {
  int seqlen_q;
  int seqlen_k;
  MaskRule rule;
  int prefix_len;  // 0: none; at most seqlen_k

  // Keys that query `q` sees besides the prefix. Both ends never decrease as q grows.
  BROADHEAD_HOST_DEVICE KeyInterval row_interval(int q) const {
    const int position = q + seqlen_k - seqlen_q;
    int begin = rule.window_left >= 0 ? position - rule.window_left : 0;
    int end = rule.window_right >= 0 ? min_int(seqlen_k, position + rule.window_right + 1) : seqlen_k;
    if (rule.attention_chunk > 0) {
      const int chunk_begin = floor_div(position, rule.attention_chunk) * rule.attention_chunk;
      begin = max_int(begin, chunk_begin);
      end = min_int(end, chunk_begin + rule.attention_chunk);
    }
    return {max_int(begin, 0), end};
  }

  BROADHEAD_HOST_DEVICE bool visible(const KeyInterval& row, int key) const {
    return key < prefix_len || (key >= row.begin && key < row.end);
  }

  // Union over queries q_first..q_last (inclusive) without the prefix: the keys a tile must load besides it.
  BROADHEAD_HOST_DEVICE KeyInterval tile_interval(int q_first, int q_last) const {
    return {row_interval(q_first).begin, row_interval(q_last).end};
  }

  // Union over keys key_first..key_last (inclusive): the queries that see one of them lie within. The inverse of
  // tile_interval.
  BROADHEAD_HOST_DEVICE QueryInterval query_interval(int key_first, int key_last) const {
    if (key_first < prefix_len) return {0, seqlen_q};
    // Query q is at position q + shift, and the ends of its interval never decrease as q grows.
    const long long shift = static_cast<long long>(seqlen_k) - seqlen_q;
    long long begin = 0, end = seqlen_q;
    if (rule.window_right >= 0) begin = max_int64(begin, key_first - static_cast<long long>(rule.window_right) - shift);
    if (rule.window_left >= 0) end = min_int64(end, key_last + static_cast<long long>(rule.window_left) - shift + 1);
    if (rule.attention_chunk > 0) {
      const long long chunk = rule.attention_chunk;
      begin = max_int64(begin, key_first / chunk * chunk - shift);
      end = min_int64(end, (key_last / chunk + 1) * chunk - shift);
    }
    return {static_cast<int>(min_int64(begin, seqlen_q)), static_cast<int>(max_int64(end, 0))};
  }

  // Queries that see every key of key_first..key_last: a step inside needs no predicate. The inverse of
  // unmasked_interval. Both ends of query_interval of one key never decrease as the key grows, but for the prefix.
  BROADHEAD_HOST_DEVICE QueryInterval unmasked_queries(int key_first, int key_last) const {
    if (key_last < prefix_len) return {0, seqlen_q};
    const int first = max_int(key_first, prefix_len);
    return {query_interval(key_last, key_last).begin, query_interval(first, first).end};
  }

  // Keys that every query of q_first..q_last sees: an n_block inside needs no predicate.
  BROADHEAD_HOST_DEVICE KeyInterval unmasked_interval(int q_first, int q_last) const {
    const KeyInterval rows{row_interval(q_last).begin, row_interval(q_first).end};
    if (prefix_len == 0) return rows;
    if (rows.begin <= prefix_len) return {0, max_int(rows.end, prefix_len)};
    return {0, prefix_len};
  }
};

// The n_blocks that a tile visits: [begin, end).
struct BlockRange {
  int begin;
  int end;
};

BROADHEAD_HOST_DEVICE BlockRange block_range(const AttentionMask& mask, int q_first, int q_last, int tile_n) {
  const KeyInterval keys = mask.tile_interval(q_first, q_last);
  int begin = keys.begin;
  int end = keys.end;
  if (end <= begin) begin = end = 0;
  if (mask.prefix_len > 0) {
    begin = 0;
    end = max_int(end, mask.prefix_len);
  }
  return {begin / tile_n, ceil_div(end, tile_n)};
}

// Split `split` of `num_splits`, which cut a range of n_blocks into equal parts.
BROADHEAD_HOST_DEVICE BlockRange split_range(BlockRange range, int split, int num_splits) {
  const int blocks = range.end - range.begin;
  return {range.begin + static_cast<int>(static_cast<long long>(blocks) * split / num_splits),
          range.begin + static_cast<int>(static_cast<long long>(blocks) * (split + 1) / num_splits)};
}

}  // namespace broadhead
