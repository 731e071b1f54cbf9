// What holds for every stream-K schedule of decode: intervals that follow each other, n_blocks in exactly one split,
// splits where the combine looks for them, and the promised share of the work for each CTA.
#pragma once

#include <array>
#include <cstring>

#include "decode/workspace.h"
#include "decode_calls.h"

namespace host_test {

using broadhead::ceil_div;
using broadhead::decode::interval_of;
using broadhead::decode::kCtasOf;
using broadhead::decode::kCtasUsedAtLeast;
using broadhead::decode::Workspace;

// How often the random calls had what the checks below are about: none of them may be idle.
struct Seen {
  // only_cost: CTAs whose interval holds no n_block.
  int split_tiles, passes, rule, rule_splits, rule_whole, unequal, long_q, long_k, fixed_splits, only_cost, unbounded,
      one_token;
};

inline Seen seen{};

// A call, and the items of all CTAs of its grid.
struct Schedule {
  const Call& call;
  std::vector<SequenceWork> works;
  WorkSum sum;
  std::vector<CtaInterval> intervals;
  std::vector<std::vector<WorkItem>> items;

  explicit Schedule(const Call& call_) : call(call_), works(works_of(call_)), sum(sum_of(call_, works)) {
    for (int g = 0; g < call.available; ++g) {
      intervals.push_back(interval_of(call.params, sum, g, call.available, call.least));
    }
    const auto starts = sequence_starts(call, works, tile_cost());
    for (const CtaInterval& interval : intervals) items.push_back(walk(call, works, starts, interval));
  }

  int tile_cost() const { return intervals[0].tile_cost; }
  bool has_fixed_splits() const { return call.params.cell_blocks > 0; }
};

inline std::array<int, 3> tile_of(const WorkItem& item) { return {item.batch, item.head, item.m_block}; }

// Intervals follow each other from the begin of the schedule to its end.
inline void check_intervals(const Schedule& schedule) {
  const std::string words = schedule.call.words();
  long long next = 0;
  int shortest = 0x7fffffff, longest = 0, used = 0;
  for (int g = 0; g < schedule.call.available; ++g) {
    const CtaInterval& interval = schedule.intervals[g];
    CHECK(interval.tile_cost == schedule.tile_cost() && interval.length >= 0, "CTA %d; %s", g, words.c_str());
    if (interval.length == 0) continue;
    CHECK(interval.begin == next, "CTA %d begins at %lld, not %lld; %s", g, interval.begin, next, words.c_str());
    next = interval.begin + interval.length;
    used = g + 1;
  }
  CHECK(next == schedule.sum.positions(schedule.tile_cost()), "the schedule ends at %lld; %s", next, words.c_str());
  if (schedule.tile_cost() != schedule.call.params.tile_cost || used == 0) return;
  if (schedule.has_fixed_splits()) used = schedule.call.available;
  for (int g = 0; g < used; ++g) {
    shortest = std::min(shortest, schedule.intervals[g].length);
    longest = std::max(longest, schedule.intervals[g].length);
  }
  CHECK(longest - shortest <= 1, "intervals of %d to %d positions; %s", shortest, longest, words.c_str());
  CHECK(schedule.has_fixed_splits() || used == 1 || shortest >= schedule.call.least, "an interval of %d; %s", shortest,
        words.c_str());
  seen.unequal += !schedule.has_fixed_splits() && longest > 0;
}

// Every tile in order, from its first n_block to its last; what its splits say of themselves.
inline void check_coverage(const Schedule& schedule) {
  const Call& call = schedule.call;
  const DecodeParams& params = call.params;
  const std::string words = call.words();
  const int most_m_blocks = ceil_div(params.seqlen_q * params.rows_per_token, call.tile_m);
  std::array<int, 3> tile{0, 0, -1};  // the one before the first
  int end = 0, tile_end = 0, splits = 0;
  long long tiles = 0;
  for (const auto& cta : schedule.items) {
    for (const WorkItem& item : cta) {
      const SequenceWork& work = schedule.works[item.batch];
      CHECK(item.range.begin < item.range.end, "an empty item; %s", words.c_str());
      CHECK(std::memcmp(&item.seqlen, &work.seqlen, sizeof(item.seqlen)) == 0, "lengths of an item; %s", words.c_str());
      if (tile_of(item) != tile) {
        CHECK(end == tile_end, "a tile of sequence %d ends at %d of %d; %s", tile[0], end, tile_end, words.c_str());
        CHECK(tile_of(item) > tile && item.head >= 0 && item.head < params.heads_in_grid && item.m_block >= 0 &&
                  item.m_block < work.m_blocks && work.m_blocks <= most_m_blocks,
              "tile (%d, %d, %d); %s", item.batch, item.head, item.m_block, words.c_str());
        tile = tile_of(item);
        end = work.begin;
        tile_end = work.end;
        splits = 0;
        ++tiles;
      }
      CHECK(item.range.begin == end, "a split begins at %d, not %d; %s", item.range.begin, end, words.c_str());
      end = item.range.end;
      const bool whole = item.range.begin == work.begin && end == work.end;
      CHECK((item.is_split == 0) == whole, "is_split of [%d, %d); %s", item.range.begin, end, words.c_str());
      if (schedule.has_fixed_splits()) {
        CHECK(item.split == splits && item.goes_on == 0, "split %d is %d; %s", splits, item.split, words.c_str());
      } else {
        CHECK((item.split != 0) == (item.range.begin > work.begin), "split of %d; %s", item.range.begin, words.c_str());
        CHECK((item.goes_on != 0) == (end < work.end), "goes_on of %d; %s", end, words.c_str());
      }
      ++splits;
      CHECK(params.num_splits <= 0 || splits <= params.num_splits, "%d splits; %s", splits, words.c_str());
    }
  }
  CHECK(end == tile_end && tiles == schedule.sum.tiles, "%lld of %d tiles; %s", tiles, schedule.sum.tiles,
        words.c_str());
}

// What decode_kernel and combine_kernel do with the splits of a stream-K call: each split tile is merged once, from
// slots that hold all of it.
inline void check_splits(const Schedule& schedule) {
  const Call& call = schedule.call;
  const std::string words = call.words();
  const int ctas = call.available;
  std::vector<const WorkItem*> slots(2 * ctas), begun(ctas);
  std::vector<bool> passes(ctas);
  int split_tiles = 0, merged = 0;
  for (int g = 0; g < ctas; ++g) {
    for (const WorkItem& item : schedule.items[g]) {
      if (item.is_split == 0) continue;
      const WorkItem*& slot = slots[Workspace{}.slot(call.params, item, g)];
      CHECK(slot == nullptr, "CTA %d has two splits for a slot; %s", g, words.c_str());
      slot = &item;
      if (item.goes_on == 0) continue;
      (item.split == 0 ? begun[g] = &item : (passes[g] = true, nullptr));
      split_tiles += item.split == 0;
    }
    seen.only_cost += schedule.items[g].empty() && schedule.intervals[g].length > 0;
    seen.passes += passes[g];
  }
  for (int g = 0; g < ctas; ++g) {
    if (begun[g] == nullptr) continue;
    ++merged;
    int splits = 2;
    while (g + splits - 1 < ctas && passes[g + splits - 1]) ++splits;
    int end = schedule.works[begun[g]->batch].begin;
    for (int split = 0; split < splits; ++split) {
      const std::size_t index = split == 0 ? 2 * g + 1 : 2 * (g + split);
      const WorkItem* item = index < slots.size() ? slots[index] : nullptr;
      CHECK(item != nullptr && tile_of(*item) == tile_of(*begun[g]) && item->range.begin == end,
            "split %d of %d of the tile that CTA %d begins; %s", split, splits, g, words.c_str());
      if (item != nullptr) end = item->range.end;
    }
    CHECK(end == schedule.works[begun[g]->batch].end, "the splits of CTA %d end at %d; %s", g, end, words.c_str());
  }
  CHECK(merged == split_tiles, "%d of %d split tiles are merged; %s", merged, split_tiles, words.c_str());
  seen.split_tiles += split_tiles;
}

// Cuts of fixed splits lie at multiples of cell_blocks, behind the declared keys excepted, and in slots of their own; a
// sequence alone, on another grid, is cut alike.
inline void check_fixed_splits(const Schedule& schedule, Random& random) {
  const Call& call = schedule.call;
  const DecodeParams& params = call.params;
  const std::string words = call.words();
  const int declared = std::max(1, ceil_div(ceil_div(params.seqlen_k, call.tile_n), params.cell_blocks));
  Workspace workspace{};
  workspace.m_blocks = ceil_div(params.seqlen_q * params.rows_per_token, call.tile_m);
  workspace.fixed_splits = declared;
  long long last = -1;
  for (const auto& cta : schedule.items) {
    for (const WorkItem& item : cta) {
      const SequenceWork& work = schedule.works[item.batch];
      CHECK(item.split == 0 || item.range.begin % params.cell_blocks == 0, "cut at %d; %s", item.range.begin,
            words.c_str());
      CHECK(item.split == declared - 1
                ? item.range.end == work.end
                : item.range.begin / params.cell_blocks == (item.range.end - 1) / params.cell_blocks,
            "split %d: [%d, %d); %s", item.split, item.range.begin, item.range.end, words.c_str());
      CHECK(item.is_split == (num_fixed_splits(params, work, call.tile_n) > 1), "is_split; %s", words.c_str());
      const long long slot = workspace.slot(params, item, 0);
      const long long first =
          (static_cast<long long>(item.batch) * params.heads_in_grid + item.head) * workspace.m_blocks + item.m_block;
      CHECK(slot > last && slot >= first * declared && slot < (first + 1) * declared, "slot %lld of a tile; %s", slot,
            words.c_str());
      last = slot;
      seen.fixed_splits += item.is_split;
    }
  }

  const int chosen = random.upto(params.batch - 1);
  Call alone = call;
  alone.connect();
  alone.params.batch = 1;
  alone.available = random.between(1, 264);
  for (const std::int32_t** lengths : {&alone.params.cu_seqlens_q, &alone.params.cu_seqlens_k, &alone.params.seqused_q,
                                       &alone.params.seqused_k, &alone.params.prefix_lens}) {
    if (*lengths != nullptr) *lengths += chosen;
  }
  std::vector<const WorkItem*> expected;
  for (const auto& cta : schedule.items) {
    for (const WorkItem& item : cta) {
      if (item.batch == chosen) expected.push_back(&item);
    }
  }
  std::size_t index = 0;
  const Schedule other(alone);
  for (const auto& cta : other.items) {
    for (const WorkItem& item : cta) {
      const WorkItem* twin = index < expected.size() ? expected[index] : nullptr;
      CHECK(twin != nullptr && item.head == twin->head && item.m_block == twin->m_block && item.split == twin->split &&
                item.is_split == twin->is_split && item.range.begin == twin->range.begin &&
                item.range.end == twin->range.end,
            "sequence %d is cut otherwise alone; %s", chosen, words.c_str());
      ++index;
    }
  }
  CHECK(index == expected.size(), "sequence %d has other items alone; %s", chosen, words.c_str());
}

// Where equal tiles are not cut where they meet: whole tiles, the same number for each CTA but the last; or one split
// a CTA, of equal size.
inline void check_equal_tiles(const Schedule& schedule) {
  const Call& call = schedule.call;
  const std::string words = call.words();
  CHECK(schedule.sum.shortest == schedule.sum.longest && !schedule.has_fixed_splits(), "tiles are not equal; %s",
        words.c_str());
  int used = 0;
  bool any_split = false;
  std::vector<int> loads;
  for (const auto& cta : schedule.items) {
    if (cta.empty()) continue;
    ++used;
    int load = 0;
    for (const WorkItem& item : cta) {
      CHECK(item.is_split == 0 || cta.size() == 1, "a split beside %zu other items; %s", cta.size() - 1, words.c_str());
      any_split |= item.is_split != 0;
      load += item.range.end - item.range.begin;
    }
    loads.push_back(load);
  }
  CHECK(used > 0, "no CTA works; %s", words.c_str());
  if (used == 0) return;
  const auto [least, most] = std::minmax_element(loads.begin(), loads.end());
  if (any_split || *most <= schedule.sum.longest) {
    CHECK(*most - *least <= 1, "%d to %d n_blocks a CTA; %s", *least, *most, words.c_str());
  } else {
    const auto same = std::count(loads.begin(), loads.end() - 1, *most);
    CHECK(static_cast<std::size_t>(same) + 1 == loads.size(), "whole tiles are dealt unevenly; %s", words.c_str());
  }
  const long long total = schedule.sum.positions(call.params.tile_cost);
  int least_length = call.least;
  if (call.params.num_splits > 1) {
    least_length = std::max(least_length, ceil_div(schedule.sum.longest - 1, call.params.num_splits - 1));
  }
  if (total >= static_cast<long long>(least_length) * call.available) {
    CHECK(used * kCtasOf >= call.available * kCtasUsedAtLeast, "%d CTAs are used; %s", used, words.c_str());
  }
  ++seen.rule;
  ++(any_split ? seen.rule_splits : seen.rule_whole);
}

// The n_blocks of a sequence's tiles are those from the first key that a row sees to the last.
inline void check_work(const Call& call, const SequenceWork& work, int batch) {
  if (work.m_blocks == 0) return;
  const int seqlen_k = work.seqlen.seqlen_k;
  const int prefix = call.prefixes.empty() ? 0 : std::min<int>(call.prefixes[batch], seqlen_k);
  const broadhead::AttentionMask mask = make_mask(call.params, work.seqlen, batch);
  int begin = prefix > 0 ? 0 : seqlen_k, end = prefix;
  for (int q = 0; q < work.seqlen.seqlen_q; ++q) {
    const broadhead::KeyInterval row = mask.row_interval(q);
    if (row.end <= row.begin) continue;
    begin = std::min(begin, row.begin);
    end = std::max(end, row.end);
  }
  const bool any = begin < end;
  CHECK(any ? work.begin == begin / call.tile_n && work.end == ceil_div(end, call.tile_n) : work.end == work.begin + 1,
        "sequence %d visits [%d, %d) for keys [%d, %d); %s", batch, work.begin, work.end, begin, end,
        call.words().c_str());
}

inline void check_call(const Call& call, Random& random) {
  const Schedule schedule(call);
  for (int b = 0; b < call.params.batch; ++b) {
    check_work(call, schedule.works[b], b);
    seen.long_q += !call.cu_q.empty() && call.cu_q[b + 1] - call.cu_q[b] > call.params.seqlen_q;
  }
  check_intervals(schedule);
  check_coverage(schedule);
  if (schedule.has_fixed_splits()) {
    check_fixed_splits(schedule, random);
  } else {
    check_splits(schedule);
  }
  if (schedule.tile_cost() == 0) check_equal_tiles(schedule);
  for (const SequenceWork& work : schedule.works) {
    CHECK(work.seqlen.seqlen_q <= call.params.seqlen_q, "rows from max_seqlen_q on; %s", call.words().c_str());
    seen.long_k += work.seqlen.seqlen_k > call.params.seqlen_k;
  }
}

}  // namespace host_test
