// common/attention_mask.h against the mask rule written out key by key: predicate, block range, unmasked blocks, the
// queries that see some keys, splits.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "common/attention_mask.h"
#include "given_masks.h"

namespace {

using broadhead::AttentionMask;

bool rule(const AttentionMask& m, int q, int key) {
  const int position = q + m.seqlen_k - m.seqlen_q;
  if (key < 0 || key >= m.seqlen_k) return false;
  if (key < m.prefix_len) return true;
  if (m.rule.window_left >= 0 && key < position - m.rule.window_left) return false;
  if (m.rule.window_right >= 0 && key > position + m.rule.window_right) return false;
  if (m.rule.attention_chunk > 0) {
    const int chunk = m.rule.attention_chunk;
    if (std::floor(static_cast<double>(key) / chunk) != std::floor(static_cast<double>(position) / chunk)) return false;
  }
  return true;
}

#define CASE "sq %d sk %d window (%d, %d) chunk %d prefix %d q %d"
#define CASE_OF(m, q) \
  m.seqlen_q, m.seqlen_k, m.rule.window_left, m.rule.window_right, m.rule.attention_chunk, m.prefix_len, q

// Whether a row's words show a key.
bool shows(const AttentionMask& mask, int q, int key) {
  const int first = key / 8 * 8 - 3;  // a word begins anywhere
  return (mask.row_word(q, mask.row_interval(q), first) >> (key - first) & 1) != 0;
}

void check_rows(const AttentionMask& mask) {
  for (int q = 0; q < mask.seqlen_q; ++q) {
    const broadhead::KeyInterval row = mask.row_interval(q);
    for (int key = 0; key < mask.seqlen_k; ++key) {
      CHECK(shows(mask, q, key) == rule(mask, q, key), CASE " key %d", CASE_OF(mask, q), key);
    }
    CHECK(row.begin >= 0 && row.end <= mask.seqlen_k, CASE, CASE_OF(mask, q));
  }
}

void check_tile(const AttentionMask& mask, int q_first, int q_last, int tile_n) {
  const broadhead::BlockRange range = broadhead::block_range(mask, q_first, q_last, tile_n, {0, 0});
  const broadhead::KeyInterval unmasked = mask.unmasked_interval(q_first, q_last);
  const broadhead::KeyInterval live = mask.tile_interval(q_first, q_last);
  CHECK(range.begin >= 0 && range.begin <= range.end && range.end * tile_n < mask.seqlen_k + tile_n, CASE,
        CASE_OF(mask, q_first));
  int first_seen = mask.seqlen_k, last_seen = -1;
  for (int key = 0; key < mask.seqlen_k; ++key) {
    bool any = false, all = true;
    for (int q = q_first; q <= q_last; ++q) {
      const bool sees = rule(mask, q, key);
      any |= sees;
      all &= sees;
    }
    if (any) {
      first_seen = std::min(first_seen, key);
      last_seen = key;
      CHECK(key / tile_n >= range.begin && key / tile_n < range.end, CASE " key %d outside the blocks",
            CASE_OF(mask, q_first), key);
      CHECK((key >= live.begin && key < live.end) || key < mask.prefix_len, CASE " key %d is not live",
            CASE_OF(mask, q_first), key);
    }
    const bool claimed = key >= unmasked.begin && key < unmasked.end;
    CHECK(!claimed || all, CASE " key %d is called unmasked", CASE_OF(mask, q_first), key);
  }
  if (last_seen < 0) return;
  CHECK(range.end == last_seen / tile_n + 1, CASE " visits blocks after the last key", CASE_OF(mask, q_first));
  CHECK(range.begin == first_seen / tile_n, CASE " visits blocks before the first key", CASE_OF(mask, q_first));
}

// Exact: the queries that see one key, and those that see every one of some keys.
void check_exact_queries(const AttentionMask& mask, int key_first, int key_last) {
  const broadhead::QueryInterval of_first = mask.query_interval(key_first, key_first);
  const broadhead::QueryInterval whole = mask.unmasked_queries(key_first, key_last);
  for (int q = 0; q < mask.seqlen_q; ++q) {
    CHECK((q >= of_first.begin && q < of_first.end) == rule(mask, q, key_first), CASE " key %d", CASE_OF(mask, q),
          key_first);
    bool all = true;
    for (int key = key_first; key <= key_last; ++key) all = all && rule(mask, q, key);
    CHECK((q >= whole.begin && q < whole.end) == all, CASE " keys %d to %d: [%d, %d)", CASE_OF(mask, q), key_first,
          key_last, whole.begin, whole.end);
  }
}

// The inverse: who sees one of some keys lies in the interval, and its ends are no further than the mask's rule
// demands.
void check_queries(const AttentionMask& mask, int key_first, int key_last) {
  const broadhead::QueryInterval queries = mask.query_interval(key_first, key_last);
  CHECK(queries.begin >= 0 && queries.begin <= mask.seqlen_q && queries.end >= 0 && queries.end <= mask.seqlen_q,
        CASE " keys %d to %d", CASE_OF(mask, 0), key_first, key_last);
  check_exact_queries(mask, key_first, key_last);
  int first_seen = mask.seqlen_q, last_seen = -1;
  for (int q = 0; q < mask.seqlen_q; ++q) {
    for (int key = key_first; key <= key_last; ++key) {
      if (!rule(mask, q, key)) continue;
      first_seen = std::min(first_seen, q);
      last_seen = q;
    }
  }
  if (last_seen < 0) return;
  CHECK(queries.begin <= first_seen && queries.end > last_seen, CASE " keys %d to %d: [%d, %d) is too short",
        CASE_OF(mask, first_seen), key_first, key_last, queries.begin, queries.end);
  if (mask.rule.window_left < 0 && mask.rule.attention_chunk == 0 && key_first >= mask.prefix_len) {
    CHECK(queries.begin == first_seen, CASE " keys %d to %d: begins too early", CASE_OF(mask, first_seen), key_first,
          key_last);
  }
}

int gaps = 0;  // tiles that do not visit all n_blocks between their first and their last

// Masks that are given as values: the predicate, the keys that tiles of queries visit, the queries that keys meet.
void check_given(AttentionMask mask, const host_test::GivenMasks& given) {
  given.give_to(mask);
  const broadhead::MaskExtents extents = given.extents();
  const int sq = mask.seqlen_q, sk = mask.seqlen_k;
  const auto sees = [&](int q, int key) {
    const bool shown = given.shows(q, key, sq, sk, mask.rule.window_left);
    if (!given.tree.empty() && key >= sk - 64) return shown;
    return shown || rule(mask, q, key);
  };
  for (int q = 0; q < sq; ++q) {
    for (int key = 0; key < sk; ++key) {
      CHECK(shows(mask, q, key) == sees(q, key), CASE " key %d", CASE_OF(mask, q), key);
    }
    const broadhead::KeyInterval row = mask.row_interval(q);
    CHECK(mask.row_word(q, row, sk) == 0, CASE " keys that do not exist", CASE_OF(mask, q));
  }
  for (const int tile : {1, 5, 16, 48}) {
    for (int first = 0; first < sq; first += tile) {
      const int last = std::min(first + tile, sq) - 1;
      const broadhead::KeyInterval by_values = broadhead::given_interval(mask, extents, first, last);
      const broadhead::BlockRange range = broadhead::block_range(mask, first, last, tile, by_values);
      broadhead::BlockGap gap;
      const broadhead::BlockRange visited = broadhead::join_ranges(
          broadhead::block_range(mask, first, last, tile, {0, 0}), broadhead::blocks_of(by_values, tile), gap);
      CHECK(visited.end + gap.blocks == range.end && visited.begin == range.begin, CASE, CASE_OF(mask, first));
      gaps += gap.blocks > 0;
      for (int block = visited.begin; block < visited.end; ++block) {
        CHECK(gap.count(gap.place(block)) == block, CASE " block %d", CASE_OF(mask, first), block);
      }
      const broadhead::KeyInterval unmasked = mask.unmasked_interval(first, last);
      const broadhead::KeyInterval live = mask.tile_interval(first, last);
      CHECK(range.end * tile < sk + tile, CASE, CASE_OF(mask, first));
      for (int key = 0; key < sk; ++key) {
        bool any = false, all = true;
        for (int q = first; q <= last; ++q) any = any || sees(q, key), all = all && sees(q, key);
        CHECK(!any || (key / tile >= range.begin && key / tile < range.end), CASE " key %d outside the blocks",
              CASE_OF(mask, first), key);
        const int block = gap.count(key / tile);
        CHECK(!any || (block >= visited.begin && block < visited.end && gap.place(block) == key / tile),
              CASE " key %d is not visited", CASE_OF(mask, first), key);
        CHECK(all || key < unmasked.begin || key >= unmasked.end, CASE " key %d is called unmasked",
              CASE_OF(mask, first), key);
        const bool by_position = (key >= live.begin && key < live.end) || key < mask.prefix_len;
        CHECK(!any || by_position || (key >= by_values.begin && key < by_values.end && extents.contains(key)),
              CASE " key %d is not live", CASE_OF(mask, first), key);
      }
    }
    if (!given.tree.empty()) continue;  // kernels of gradients have none
    for (int first = 0; first < sk; first += tile) {
      const int last = std::min(first + tile, sk) - 1;
      const broadhead::QueryInterval queries = mask.query_interval(first, last),
                                     more = broadhead::given_queries(mask, extents, first, last);
      const broadhead::QueryInterval whole = mask.unmasked_queries(first, last);
      for (int q = 0; q < sq; ++q) {
        bool any = false, all = true;
        for (int key = first; key <= last; ++key) any = any || sees(q, key), all = all && sees(q, key);
        CHECK(!any || (q >= queries.begin && q < queries.end) || (q >= more.begin && q < more.end),
              CASE " keys %d to %d", CASE_OF(mask, q), first, last);
        CHECK(all || q < whole.begin || q >= whole.end, CASE " keys %d to %d", CASE_OF(mask, q), first, last);
      }
    }
  }
}

void check_all_given() {
  std::mt19937 random(20);
  const int lengths_q[] = {1, 17, 40}, lengths_k[] = {0, 1, 31, 64, 65, 100}, sides[] = {-1, 0, 5, 70};
  for (const int sq : lengths_q) {
    for (const int sk : lengths_k) {
      for (const int left : sides) {
        for (const int right : {-1, 0, 3}) {
          for (const int chunk : {0, 7}) {
            const AttentionMask mask{sq, sk, {left, right, chunk}, right == 0 ? std::min(sk, sq / 2) : 0};
            host_test::GivenMasks given;
            given.in_window = random() % 2 == 0;
            given.ranges = host_test::draw_ranges(sq, sk, random);
            given.find_extents(sq, sk, left);
            check_given(mask, given);
            host_test::GivenMasks tree;
            for (int q = 0; q < sq; ++q) {
              tree.tree.push_back(static_cast<std::int64_t>(static_cast<std::uint64_t>(random()) << 32 | random()));
            }
            tree.find_extents(sq, sk, left);
            AttentionMask without_prefix = mask;
            without_prefix.prefix_len = 0;
            check_given(without_prefix, tree);
          }
        }
      }
    }
  }
}

void check_splits() {
  for (int blocks = 0; blocks <= 40; ++blocks) {
    for (int splits = 1; splits <= 12; ++splits) {
      int next = 3;
      for (int split = 0; split < splits; ++split) {
        const broadhead::BlockRange share = broadhead::split_range({3, 3 + blocks}, split, splits);
        CHECK(share.begin == next && share.end >= share.begin, "%d blocks, share %d of %d", blocks, split, splits);
        CHECK(share.end - share.begin <= (blocks + splits - 1) / splits, "%d blocks, share %d of %d", blocks, split,
              splits);
        next = share.end;
      }
      CHECK(next == 3 + blocks, "%d blocks in %d shares", blocks, splits);
    }
  }
}

}  // namespace

int main() {
  const int lengths_q[] = {1, 2, 5, 9, 16}, lengths_k[] = {0, 1, 4, 9, 17, 23}, windows[] = {-1, 0, 1, 3, 7, 40};
  const int chunks[] = {0, 1, 3, 8}, prefixes[] = {0, 1, 6, 17};
  for (int sq : lengths_q) {
    for (int sk : lengths_k) {
      for (int left : windows) {
        for (int right : windows) {
          for (int chunk : chunks) {
            for (int prefix : prefixes) {
              if (prefix > 0 && right != 0) continue;  // prefix_lens requires a causal mask
              const AttentionMask mask{sq, sk, {left, right, chunk}, std::min(prefix, sk)};
              check_rows(mask);
              for (int tile_n : {1, 4, 16}) {
                for (int key = 0; key < sk; key += tile_n) check_queries(mask, key, std::min(key + tile_n, sk) - 1);
              }
              for (int tile_m : {1, 4, 16}) {
                for (int q = 0; q < sq; q += tile_m) {
                  for (int tile_n : {4, 16}) check_tile(mask, q, std::min(q + tile_m, sq) - 1, tile_n);
                }
              }
            }
          }
        }
      }
    }
  }
  check_all_given();
  CHECK(gaps > 100, "%d gaps", gaps);
  check_splits();
  return host_test::finish();
}
