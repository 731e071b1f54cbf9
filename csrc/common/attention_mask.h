// Which keys a query sees. One object owns the block range, the per-element predicate and their inverses, so they
// cannot disagree.
//
// Query i of a sequence sits at position p = i + seqlen_k - seqlen_q (bottom-right alignment). It sees the interval
// [p - window_left, p + window_right] within its attention_chunk, every key below prefix_len, and the range of keys
// that the call gives for it. With a tree_mask the last keys are seen by that mask alone.
#pragma once

#include "common/key_words.h"
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

// The smallest interval that holds both.
BROADHEAD_HOST_DEVICE KeyInterval hull(const KeyInterval& a, const KeyInterval& b) {
  if (b.end <= b.begin) return a;
  if (a.end <= a.begin) return b;
  return {min_int(a.begin, b.begin), max_int(a.end, b.end)};
}

constexpr int kTreeKeys = 64;       // keys that a tree_mask has bits for
constexpr int kExtentQueries = 16;  // neighbouring queries whose ranges are summed up together
constexpr int kExtentKeys = 32;     // neighbouring keys, likewise

// What the ranges of all queries say of kExtentKeys keys.
struct KeyExtent {
  std::uint32_t live;    // a bit for each key that some query sees by its range or by the tree_mask
  std::int32_t q_begin;  // queries whose range holds one of these keys lie in [q_begin, q_end)
  std::int32_t q_end;
};

// Where the extents of one sequence lie; null where its call gives no such mask.
struct MaskExtents {
  const KeyInterval* of_queries = nullptr;  // what queries [16 i, 16 i + 16) see by their ranges lies within
  const KeyExtent* of_keys = nullptr;       // of keys [32 i, 32 i + 32)

  // Whether some query sees `key`, which exists, by its range or by the tree_mask.
  BROADHEAD_HOST_DEVICE bool contains(int key) const {
    return of_keys != nullptr && ((of_keys[key / kExtentKeys].live >> (key % kExtentKeys)) & 1) != 0;
  }
};

// The mask of a sequence that its call gives as values.
enum class Given : std::int32_t { kNone, kRanges, kRangesInWindow, kTree };

// All that a call gives a sequence as values, worked out by the step in front of its kernel. PERF: a kernel that did it
// by itself would have to skip that code, which no cache holds, in calls without such masks.
struct alignas(16) SequenceMask {
  Given kind;
  int tree_keys;     // as AttentionMask's, like the next ones
  int window_right;  // of its rule
  const void* given;
  std::int64_t given_stride;
  KeyInterval within;  // what its queries see by their ranges or by the tree_mask lies within
  MaskExtents extents;
};

struct AttentionMask {
  int seqlen_q;
  int seqlen_k;
  MaskRule rule;
  int prefix_len;     // 0: none; at most seqlen_k
  int tree_keys = 0;  // the last keys, which the tree_mask alone shows: kTreeKeys with one, else 0
  Given kind = Given::kNone;
  const void* given = nullptr;    // of query 0: its range (two int32), or its word of the tree_mask (int64)
  std::int64_t given_stride = 0;  // from a query to the next

  BROADHEAD_HOST_DEVICE void give(const SequenceMask& sequence) {
    rule.window_right = sequence.window_right;
    kind = sequence.kind;
    tree_keys = sequence.tree_keys;
    given = sequence.given;
    given_stride = sequence.given_stride;
  }

  // Keys that query `q` sees by its position. Both ends never decrease as q grows.
  BROADHEAD_HOST_DEVICE KeyInterval row_interval(int q) const {
    const int position = q + seqlen_k - seqlen_q;
    const int last = seqlen_k - tree_keys;
    int begin = rule.window_left >= 0 ? position - rule.window_left : 0;
    int end = rule.window_right >= 0 ? min_int(last, position + rule.window_right + 1) : last;
    if (rule.attention_chunk > 0) {
      const int chunk_begin = floor_div(position, rule.attention_chunk) * rule.attention_chunk;
      begin = max_int(begin, chunk_begin);
      end = min_int(end, chunk_begin + rule.attention_chunk);
    }
    return {max_int(begin, 0), end};
  }

  // Keys that query `q` sees by its range. A query that does not exist has that of the last one.
  BROADHEAD_HOST_DEVICE KeyInterval row_range(int q) const {
    if ((kind != Given::kRanges && kind != Given::kRangesInWindow) || seqlen_q <= 0) return {0, 0};
    const std::int32_t* range = static_cast<const std::int32_t*>(given) + clamp_int(q, 0, seqlen_q - 1) * given_stride;
    return clipped_range(q, range[0], range[1]);
  }

  // What a range [begin, end) that is given for query `q` shows.
  BROADHEAD_HOST_DEVICE KeyInterval clipped_range(int q, int begin, int end) const {
    end = clamp_int(end, 0, seqlen_k);  // words are of differences with it, which must not overflow
    if (begin < 0) return {0, 0};
    if (kind == Given::kRangesInWindow && rule.window_left >= 0) {
      begin = max_int(begin, q + seqlen_k - seqlen_q - rule.window_left);
    }
    return {begin, end};
  }

  // Which of the 32 keys from key0 on query `q` sees by its range or by the tree_mask: a bit for each.
  BROADHEAD_HOST_DEVICE std::uint32_t given_word(int q, int key0) const {
    if (kind == Given::kTree && seqlen_q > 0) {
      const std::int64_t word = static_cast<const std::int64_t*>(given)[clamp_int(q, 0, seqlen_q - 1) * given_stride];
      return bits_from(static_cast<std::uint64_t>(word), key0 - (seqlen_k - kTreeKeys));
    }
    const KeyInterval range = row_range(q);
    return bits_between(range.begin - key0, range.end - key0);
  }

  // Which of them a query sees by its position or by the prefix. `row`: its row_interval.
  BROADHEAD_HOST_DEVICE std::uint32_t placed_word(const KeyInterval& row, int key0) const {
    return bits_between(row.begin - key0, row.end - key0) | bits_below(prefix_len - key0);
  }

  // Which of them query `q` sees by all of these. PERF: what is given is read again for each word, so that it takes no
  // registers in between.
  BROADHEAD_HOST_DEVICE std::uint32_t row_word(int q, const KeyInterval& row, int key0) const {
    std::uint32_t seen = placed_word(row, key0);
    if (kind != Given::kNone) seen |= given_word(q, key0);
    return seen;
  }

  // Union over queries q_first..q_last (inclusive) by their positions: the keys a tile must load besides the prefix
  // and given_interval.
  BROADHEAD_HOST_DEVICE KeyInterval tile_interval(int q_first, int q_last) const {
    return {row_interval(q_first).begin, row_interval(q_last).end};
  }

  // Union over keys key_first..key_last (inclusive): the queries that see one of them by their positions or by the
  // prefix lie within. The inverse of tile_interval.
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

// Sets what a tile of queries sees by its ranges or by the tree_mask: it lies within `given`, a given_interval. Where
// no query has a range, as in most tiles, the mask is one without ranges.
BROADHEAD_HOST_DEVICE void narrow_given(AttentionMask& mask, const KeyInterval& given) {
  if (given.end <= given.begin) mask.kind = Given::kNone;
}

// The keys of an extent that the sequence has. Whatever extents hold where another stream makes a sequence longer than
// they knew it, what follows from them lies within its keys, and likewise its queries.
BROADHEAD_HOST_DEVICE KeyInterval existing_keys(const AttentionMask& mask, const KeyInterval& extent) {
  return {max_int(extent.begin, 0), min_int(extent.end, mask.seqlen_k)};
}

// What queries q_first..q_last (inclusive) see by their ranges, or by the tree_mask, lies within.
BROADHEAD_HOST_DEVICE KeyInterval given_interval(const AttentionMask& mask, const MaskExtents& extents, int q_first,
                                                 int q_last) {
  if (mask.kind == Given::kNone || q_last < q_first) return {0, 0};
  if (mask.kind == Given::kTree) return {max_int(0, mask.seqlen_k - kTreeKeys), mask.seqlen_k};
  KeyInterval all{0, 0};
  BROADHEAD_NO_UNROLL  // PERF: head_dim 192 of e4m3 has no registers for more
      for (int i = max_int(q_first, 0) / kExtentQueries; i <= q_last / kExtentQueries; ++i) {
    all = hull(all, existing_keys(mask, extents.of_queries[i]));
  }
  return all;
}

// The inverse, for ranges: the queries that see one of keys key_first..key_last (inclusive) by theirs lie within.
BROADHEAD_HOST_DEVICE QueryInterval given_queries(const AttentionMask& mask, const MaskExtents& extents, int key_first,
                                                  int key_last) {
  if (mask.kind == Given::kNone || key_last < key_first) return {0, 0};
  KeyInterval all{0, 0};
  for (int i = key_first / kExtentKeys; i <= key_last / kExtentKeys; ++i) {
    all = hull(all, {extents.of_keys[i].q_begin, extents.of_keys[i].q_end});
  }
  return {max_int(all.begin, 0), min_int(all.end, mask.seqlen_q)};
}

// The n_blocks that a tile visits: [begin, end).
struct BlockRange {
  int begin;
  int end;
};

// n_blocks that lie between those a tile visits. A tile counts only those that it visits.
struct BlockGap {
  int first;   // the first n_block behind it, as the tile counts
  int blocks;  // how many lie between; 0: there is no gap

  // Where n_block `block` of the tile lies among all, and the inverse for one that the tile visits, or an end of such.
  BROADHEAD_HOST_DEVICE int place(int block) const { return block >= first ? block + blocks : block; }
  BROADHEAD_HOST_DEVICE int count(int place) const { return place >= first + blocks ? place - blocks : place; }
};

// The n_blocks that hold keys of an interval.
BROADHEAD_HOST_DEVICE BlockRange blocks_of(const KeyInterval& keys, int tile_n) {
  if (keys.end <= keys.begin) return {0, 0};
  return {keys.begin / tile_n, ceil_div(keys.end, tile_n)};
}

// `given`: given_interval of the same queries.
BROADHEAD_HOST_DEVICE BlockRange block_range(const AttentionMask& mask, int q_first, int q_last, int tile_n,
                                             const KeyInterval& given) {
  return blocks_of(hull(hull(mask.tile_interval(q_first, q_last), {0, mask.prefix_len}), given), tile_n);
}

// The n_blocks of two ranges, without those that lie between them: `gap`.
BROADHEAD_HOST_DEVICE BlockRange join_ranges(const BlockRange& a, const BlockRange& b, BlockGap& gap) {
  gap = {0, 0};
  if (b.end <= b.begin) return a;
  if (a.end <= a.begin) return b;
  const BlockRange low = a.begin < b.begin ? a : b, high = a.begin < b.begin ? b : a;
  if (high.begin > low.end) gap = {low.end, high.begin - low.end};
  return {low.begin, max_int(low.end, high.end) - gap.blocks};
}

// Split `split` of `num_splits`, which cut a range of n_blocks into equal parts.
BROADHEAD_HOST_DEVICE BlockRange split_range(BlockRange range, int split, int num_splits) {
  if (num_splits == 1) return range;
  const int blocks = range.end - range.begin;
  return {range.begin + static_cast<int>(static_cast<long long>(blocks) * split / num_splits),
          range.begin + static_cast<int>(static_cast<long long>(blocks) * (split + 1) / num_splits)};
}

}  // namespace broadhead
