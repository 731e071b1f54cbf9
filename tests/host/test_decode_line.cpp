// decode/line.h: whatever the batch, every key block of every tile is in exactly one part, parts lie where the combine
// looks for them, and the blocks of the grid share the work as promised.
#include <array>
#include <cstring>

#include "decode/workspace.h"
#include "decode_calls.h"

namespace {

using namespace host_test;
using broadhead::ceil_div;
using broadhead::decode::interval_of;
using broadhead::decode::kUsedAtLeast;
using broadhead::decode::kUsedOf;
using broadhead::decode::Workspace;

// How often the random calls had what the checks below are about: none of them may be idle.
struct Seen {
  // only_cost: blocks whose interval holds no key block.
  int split_tiles, passes, rule, rule_splits, rule_whole, unequal, long_q, long_k, cells, only_cost, unbounded,
      one_token;
} seen{};

// A call, and the items of all blocks of its grid.
struct Line {
  const Call& call;
  std::vector<SequenceWork> works;
  LineSum sum;
  std::vector<LineInterval> intervals;
  std::vector<std::vector<LineItem>> items;

  explicit Line(const Call& call_) : call(call_), works(works_of(call_)), sum(sum_of(call_, works)) {
    for (int g = 0; g < call.available; ++g) {
      intervals.push_back(interval_of(call.params, sum, g, call.available, call.least));
    }
    const auto starts = starts_on_line(call, works, tile_cost());
    for (const LineInterval& interval : intervals) items.push_back(walk(call, works, starts, interval));
  }

  int tile_cost() const { return intervals[0].tile_cost; }
  bool in_cells() const { return call.params.cell_blocks > 0; }
};

std::array<int, 3> tile_of(const LineItem& item) { return {item.batch, item.head, item.m_block}; }

// Intervals follow each other from the begin of the line to its end.
void check_intervals(const Line& line) {
  const std::string words = line.call.words();
  long long next = 0;
  int shortest = 0x7fffffff, longest = 0, used = 0;
  for (int g = 0; g < line.call.available; ++g) {
    const LineInterval& interval = line.intervals[g];
    CHECK(interval.tile_cost == line.tile_cost() && interval.length >= 0, "block %d; %s", g, words.c_str());
    if (interval.length == 0) continue;
    CHECK(interval.begin == next, "block %d begins at %lld, not %lld; %s", g, interval.begin, next, words.c_str());
    next = interval.begin + interval.length;
    used = g + 1;
  }
  CHECK(next == line.sum.positions(line.tile_cost()), "the line ends at %lld; %s", next, words.c_str());
  if (line.tile_cost() != line.call.params.tile_cost || used == 0) return;
  if (line.in_cells()) used = line.call.available;
  for (int g = 0; g < used; ++g) {
    shortest = std::min(shortest, line.intervals[g].length);
    longest = std::max(longest, line.intervals[g].length);
  }
  CHECK(longest - shortest <= 1, "intervals of %d to %d positions; %s", shortest, longest, words.c_str());
  CHECK(line.in_cells() || used == 1 || shortest >= line.call.least, "an interval of %d; %s", shortest, words.c_str());
  seen.unequal += !line.in_cells() && longest > 0;
}

// Every tile in order, from its first key block to its last; what its parts say of themselves.
void check_coverage(const Line& line) {
  const Call& call = line.call;
  const DecodeParams& params = call.params;
  const std::string words = call.words();
  const int most_m_blocks = ceil_div(params.seqlen_q * params.rows_per_token, call.tile_m);
  std::array<int, 3> tile{0, 0, -1};  // the one before the first
  int end = 0, tile_end = 0, parts = 0;
  long long tiles = 0;
  for (const auto& block : line.items) {
    for (const LineItem& item : block) {
      const SequenceWork& work = line.works[item.batch];
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
        parts = 0;
        ++tiles;
      }
      CHECK(item.range.begin == end, "a part begins at %d, not %d; %s", item.range.begin, end, words.c_str());
      end = item.range.end;
      const bool whole = item.range.begin == work.begin && end == work.end;
      CHECK((item.is_part == 0) == whole, "is_part of [%d, %d); %s", item.range.begin, end, words.c_str());
      if (line.in_cells()) {
        CHECK(item.part == parts && item.goes_on == 0, "cell %d is %d; %s", parts, item.part, words.c_str());
      } else {
        CHECK((item.part != 0) == (item.range.begin > work.begin), "part of %d; %s", item.range.begin, words.c_str());
        CHECK((item.goes_on != 0) == (end < work.end), "goes_on of %d; %s", end, words.c_str());
      }
      ++parts;
      CHECK(params.num_splits <= 0 || parts <= params.num_splits, "%d parts; %s", parts, words.c_str());
    }
  }
  CHECK(end == tile_end && tiles == line.sum.tiles, "%lld of %d tiles; %s", tiles, line.sum.tiles, words.c_str());
}

// What decode_kernel and combine_kernel do with the parts of a balanced call: each split tile is merged once, from
// slots that hold all of it.
void check_parts(const Line& line) {
  const Call& call = line.call;
  const std::string words = call.words();
  const int blocks = call.available;
  std::vector<const LineItem*> slots(2 * blocks), begun(blocks);
  std::vector<bool> passes(blocks);
  int split_tiles = 0, merged = 0;
  for (int g = 0; g < blocks; ++g) {
    for (const LineItem& item : line.items[g]) {
      if (item.is_part == 0) continue;
      const LineItem*& slot = slots[Workspace{}.slot(call.params, item, g)];
      CHECK(slot == nullptr, "block %d has two parts for a slot; %s", g, words.c_str());
      slot = &item;
      if (item.goes_on == 0) continue;
      (item.part == 0 ? begun[g] = &item : (passes[g] = true, nullptr));
      split_tiles += item.part == 0;
    }
    seen.only_cost += line.items[g].empty() && line.intervals[g].length > 0;
    seen.passes += passes[g];
  }
  for (int g = 0; g < blocks; ++g) {
    if (begun[g] == nullptr) continue;
    ++merged;
    int parts = 2;
    while (g + parts - 1 < blocks && passes[g + parts - 1]) ++parts;
    int end = line.works[begun[g]->batch].begin;
    for (int part = 0; part < parts; ++part) {
      const std::size_t index = part == 0 ? 2 * g + 1 : 2 * (g + part);
      const LineItem* item = index < slots.size() ? slots[index] : nullptr;
      CHECK(item != nullptr && tile_of(*item) == tile_of(*begun[g]) && item->range.begin == end,
            "part %d of %d of the tile that block %d begins; %s", part, parts, g, words.c_str());
      if (item != nullptr) end = item->range.end;
    }
    CHECK(end == line.works[begun[g]->batch].end, "the parts of block %d end at %d; %s", g, end, words.c_str());
  }
  CHECK(merged == split_tiles, "%d of %d split tiles are merged; %s", merged, split_tiles, words.c_str());
  seen.split_tiles += split_tiles;
}

// Cuts of cells lie at multiples of cell_blocks, behind the declared keys excepted, and in slots of their own; a
// sequence alone, on another grid, is cut alike.
void check_cells(const Line& line, Random& random) {
  const Call& call = line.call;
  const DecodeParams& params = call.params;
  const std::string words = call.words();
  const int declared = std::max(1, ceil_div(ceil_div(params.seqlen_k, call.keys), params.cell_blocks));
  Workspace workspace{};
  workspace.m_blocks = ceil_div(params.seqlen_q * params.rows_per_token, call.tile_m);
  workspace.cells = declared;
  long long last = -1;
  for (const auto& block : line.items) {
    for (const LineItem& item : block) {
      const SequenceWork& work = line.works[item.batch];
      CHECK(item.part == 0 || item.range.begin % params.cell_blocks == 0, "cut at %d; %s", item.range.begin,
            words.c_str());
      CHECK(item.part == declared - 1
                ? item.range.end == work.end
                : item.range.begin / params.cell_blocks == (item.range.end - 1) / params.cell_blocks,
            "cell %d: [%d, %d); %s", item.part, item.range.begin, item.range.end, words.c_str());
      CHECK(item.is_part == (cells_of(params, work, call.keys) > 1), "is_part; %s", words.c_str());
      const long long slot = workspace.slot(params, item, 0);
      const long long first =
          (static_cast<long long>(item.batch) * params.heads_in_grid + item.head) * workspace.m_blocks + item.m_block;
      CHECK(slot > last && slot >= first * declared && slot < (first + 1) * declared, "slot %lld of a tile; %s", slot,
            words.c_str());
      last = slot;
      seen.cells += item.is_part;
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
  std::vector<const LineItem*> expected;
  for (const auto& block : line.items) {
    for (const LineItem& item : block) {
      if (item.batch == chosen) expected.push_back(&item);
    }
  }
  std::size_t index = 0;
  const Line other(alone);
  for (const auto& block : other.items) {
    for (const LineItem& item : block) {
      const LineItem* twin = index < expected.size() ? expected[index] : nullptr;
      CHECK(twin != nullptr && item.head == twin->head && item.m_block == twin->m_block && item.part == twin->part &&
                item.is_part == twin->is_part && item.range.begin == twin->range.begin &&
                item.range.end == twin->range.end,
            "sequence %d is cut otherwise alone; %s", chosen, words.c_str());
      ++index;
    }
  }
  CHECK(index == expected.size(), "sequence %d has other items alone; %s", chosen, words.c_str());
}

// Where equal tiles are not cut where they meet: whole tiles, the same number for each block but the last; or one part
// a block, of equal size.
void check_equal_tiles(const Line& line) {
  const Call& call = line.call;
  const std::string words = call.words();
  CHECK(line.sum.shortest == line.sum.longest && !line.in_cells(), "tiles are not equal; %s", words.c_str());
  int used = 0;
  bool any_part = false;
  std::vector<int> loads;
  for (const auto& block : line.items) {
    if (block.empty()) continue;
    ++used;
    int load = 0;
    for (const LineItem& item : block) {
      CHECK(item.is_part == 0 || block.size() == 1, "a part beside %zu other items; %s", block.size() - 1,
            words.c_str());
      any_part |= item.is_part != 0;
      load += item.range.end - item.range.begin;
    }
    loads.push_back(load);
  }
  CHECK(used > 0, "no block works; %s", words.c_str());
  if (used == 0) return;
  const auto [least, most] = std::minmax_element(loads.begin(), loads.end());
  if (any_part || *most <= line.sum.longest) {
    CHECK(*most - *least <= 1, "%d to %d key blocks a block; %s", *least, *most, words.c_str());
  } else {
    const auto same = std::count(loads.begin(), loads.end() - 1, *most);
    CHECK(static_cast<std::size_t>(same) + 1 == loads.size(), "whole tiles are dealt unevenly; %s", words.c_str());
  }
  const long long total = line.sum.positions(call.params.tile_cost);
  int least_length = call.least;
  if (call.params.num_splits > 1) {
    least_length = std::max(least_length, ceil_div(line.sum.longest - 1, call.params.num_splits - 1));
  }
  if (total >= static_cast<long long>(least_length) * call.available) {
    CHECK(used * kUsedOf >= call.available * kUsedAtLeast, "%d blocks are used; %s", used, words.c_str());
  }
  ++seen.rule;
  ++(any_part ? seen.rule_splits : seen.rule_whole);
}

// The key blocks of a sequence's tiles are those from the first key that a row sees to the last.
void check_work(const Call& call, const SequenceWork& work, int batch) {
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
  CHECK(any ? work.begin == begin / call.keys && work.end == ceil_div(end, call.keys) : work.end == work.begin + 1,
        "sequence %d visits [%d, %d) for keys [%d, %d); %s", batch, work.begin, work.end, begin, end,
        call.words().c_str());
}

void check_call(const Call& call, Random& random) {
  const Line line(call);
  for (int b = 0; b < call.params.batch; ++b) {
    check_work(call, line.works[b], b);
    seen.long_q += !call.cu_q.empty() && call.cu_q[b + 1] - call.cu_q[b] > call.params.seqlen_q;
  }
  check_intervals(line);
  check_coverage(line);
  if (line.in_cells()) {
    check_cells(line, random);
  } else {
    check_parts(line);
  }
  if (line.tile_cost() == 0) check_equal_tiles(line);
  for (const SequenceWork& work : line.works) {
    CHECK(work.seqlen.seqlen_q <= call.params.seqlen_q, "rows from max_seqlen_q on; %s", call.words().c_str());
    seen.long_k += work.seqlen.seqlen_k > call.params.seqlen_k;
  }
}

// The rule for equal tiles at its edges: `used` blocks, or 0: tiles are cut where they meet.
void check_rule(int batch, int key_blocks, int num_splits, int available, int least, int used) {
  Call call;
  call.set_heads(1, 1, true);
  call.params.batch = batch;
  call.params.seqlen_q = 1;
  call.params.seqlen_k = key_blocks * call.keys;
  call.params.window_left = call.params.window_right = -1;
  call.params.num_splits = num_splits;
  call.params.tile_cost = 20;
  call.available = available;
  call.least = least;
  Random random(0);
  check_call(call, random);
  const Line line(call);
  const auto works = [](const std::vector<LineItem>& items) { return !items.empty(); };
  const auto got = std::count_if(line.items.begin(), line.items.end(), works);
  CHECK((line.tile_cost() == 0) == (used > 0) && (used == 0 || got == used), "%d of %d blocks, not %d; %s",
        static_cast<int>(got), available, used, call.words().c_str());
}

void check_rules() {
  check_rule(128, 500, 0, 132, 8, 128);
  check_rule(116, 500, 0, 132, 8, 116);  // the first above 7 of 8
  check_rule(115, 500, 0, 132, 8, 0);
  check_rule(8, 500, 0, 132, 8, 128);    // 16 parts of a tile
  check_rule(8, 500, 16, 132, 8, 128);
  check_rule(66, 500, 2, 132, 8, 132);
  check_rule(264, 500, 0, 132, 8, 132);  // two tiles a block
  check_rule(133, 500, 0, 132, 8, 0);    // two tiles a block would leave half of them idle
  check_rule(255, 500, 0, 132, 8, 128);  // the last block has one
  check_rule(1, 2, 0, 132, 1, 2);        // less work than blocks
  check_rule(1, 7, 0, 132, 8, 1);        // too short for two
}

// More than 2^31 positions in a sequence: no walk over all of them, but at the cuts.
void check_large(int cell_blocks, bool equal) {
  Call call;
  call.set_heads(2, 8, true);
  DecodeParams& params = call.params;
  params.batch = 2;
  params.seqlen_q = 1 << 19;
  params.seqlen_k = 1 << 20;
  params.window_left = params.window_right = -1;
  params.cell_blocks = cell_blocks;
  params.tile_cost = 40;
  call.used_k = {params.seqlen_k, equal ? params.seqlen_k : params.seqlen_k - 1000};
  call.connect();
  const std::string words = call.words();
  const auto works = works_of(call);
  const LineSum sum = sum_of(call, works);
  LineInterval before{0, 0, 0};
  for (int g = 0; g < call.available; ++g) {
    const LineInterval interval = interval_of(params, sum, g, call.available, call.least);
    const auto starts = starts_on_line(call, works, interval.tile_cost);
    CHECK(starts[1] > 0x7fffffff, "the sequence is small; %s", words.c_str());
    CHECK(interval.begin == before.begin + before.length && interval.length > 0, "block %d; %s", g, words.c_str());
    CHECK((interval.tile_cost == 0) == (equal && cell_blocks == 0), "tile_cost of block %d; %s", g, words.c_str());
    before = interval;
    const int batch = interval.begin >= starts[1];
    LineCursor cursor{};
    cursor.work = works[batch];
    cursor.tile_cost = interval.tile_cost;
    cursor.left = interval.length;
    const long long position = interval.begin - starts[batch];
    cursor.stand_on(position);
    const long long cost = interval.tile_cost + key_blocks(cursor.work);
    CHECK(cursor.tile == position / cost && cursor.within == position % cost, "block %d stands on %d, %d; %s", g,
          cursor.tile, cursor.within, words.c_str());
    for (int i = 0; i < 3; ++i) {
      const int tile = cursor.tile;
      LineItem item;
      if (!take_part_of(call, cursor, item)) continue;
      CHECK(item.head * works[batch].m_blocks + item.m_block == tile && item.range.end <= works[batch].end,
            "an item of block %d; %s", g, words.c_str());
    }
  }
  CHECK(before.begin + before.length == sum.positions(before.tile_cost), "the line's end; %s", words.c_str());
}

// Few parts of a tile on a line of more than 2^31 positions that is too short for all blocks.
void check_long_tiles() {
  Call call;
  call.set_heads(40, 1, true);
  call.params.batch = 1;
  call.params.seqlen_q = 1;
  call.params.seqlen_k = 1 << 30;
  call.params.window_left = call.params.window_right = -1;
  call.params.num_splits = 2;
  call.params.tile_cost = 40;
  Random random(0);
  check_call(call, random);
}

// Without masks the same as with them, where lengths are not above what the call declared.
void check_sees_all(const Call& call) {
  DecodeParams params = call.params;
  if (!sees_all(params)) return;
  for (int b = 0; b < params.batch; ++b) {
    params.sees_all = 1;
    const SequenceWork fast = sequence_work(params, b, call.tile_m, call.keys);
    params.sees_all = 0;
    const SequenceWork work = sequence_work(params, b, call.tile_m, call.keys);
    const int seqlen_q = work.seqlen.seqlen_q;
    if (seqlen_q == 0 || seqlen_q > params.seqlen_q) continue;
    CHECK(fast.begin == work.begin && fast.end == work.end && fast.m_blocks == work.m_blocks, "sequence %d; %s", b,
          call.words().c_str());
    const auto mask = make_mask(params, work.seqlen, b);
    for (const auto& keys : {mask.tile_interval(0, seqlen_q - 1), mask.unmasked_interval(0, seqlen_q - 1)}) {
      CHECK(keys.begin == 0 && keys.end == work.seqlen.seqlen_k, "sequence %d: [%d, %d); %s", b, keys.begin, keys.end,
            call.words().c_str());
    }
    ++(params.window_right < 0 ? seen.unbounded : seen.one_token);
  }
}

}  // namespace

int main() {
  for (unsigned seed = 1; seed <= 12000; ++seed) {
    Call call;
    make_random_call(call, seed);
    Random random(seed);
    check_call(call, random);
    check_sees_all(call);
  }
  check_rules();
  for (const int cell_blocks : {0, 4, kOneCell}) {
    for (const bool equal : {false, true}) check_large(cell_blocks, equal);
  }
  check_long_tiles();
  CHECK(seen.split_tiles && seen.passes && seen.rule_splits && seen.rule_whole && seen.unequal && seen.long_q &&
            seen.long_k && seen.cells && seen.only_cost && seen.unbounded && seen.one_token,
        "a kind of call was never drawn");
  return host_test::finish();
}
