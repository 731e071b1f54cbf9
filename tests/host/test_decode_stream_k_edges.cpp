// decode/stream_k.h at its edges: where equal tiles become uncut ones, and work of more than 2^31 positions.
#include "decode_schedule.h"

namespace {

using namespace host_test;

// The rule for equal tiles at its edges: `used` CTAs, or 0: tiles are cut where they meet.
void check_rule(int batch, int n_blocks, int num_splits, int available, int least, int used) {
  Call call;
  call.set_heads(1, 1, true);
  call.params.batch = batch;
  call.params.seqlen_q = 1;
  call.params.seqlen_k = n_blocks * call.tile_n;
  call.params.mask_rule.window_left = call.params.mask_rule.window_right = -1;
  call.params.num_splits = num_splits;
  call.params.tile_cost = 20;
  call.available = available;
  call.least = least;
  Random random(0);
  check_call(call, random);
  const Schedule schedule(call);
  const auto works = [](const std::vector<WorkItem>& items) { return !items.empty(); };
  const auto got = std::count_if(schedule.items.begin(), schedule.items.end(), works);
  CHECK((schedule.tile_cost() == 0) == (used > 0) && (used == 0 || got == used), "%d of %d CTAs, not %d; %s",
        static_cast<int>(got), available, used, call.words().c_str());
}

void check_rules() {
  check_rule(128, 500, 0, 132, 8, 128);
  check_rule(116, 500, 0, 132, 8, 116);  // the first above 7 of 8
  check_rule(115, 500, 0, 132, 8, 0);
  check_rule(8, 500, 0, 132, 8, 128);  // 16 splits of a tile
  check_rule(8, 500, 16, 132, 8, 128);
  check_rule(66, 500, 2, 132, 8, 132);
  check_rule(264, 500, 0, 132, 8, 132);  // two tiles a CTA
  check_rule(133, 500, 0, 132, 8, 0);    // two tiles a CTA would leave half of them idle
  check_rule(255, 500, 0, 132, 8, 128);  // the last CTA has one
  check_rule(1, 2, 0, 132, 1, 2);        // less work than CTAs
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
  params.mask_rule.window_left = params.mask_rule.window_right = -1;
  params.cell_blocks = cell_blocks;
  params.tile_cost = 40;
  call.used_k = {params.seqlen_k, equal ? params.seqlen_k : params.seqlen_k - 1000};
  call.connect();
  const std::string words = call.words();
  const auto works = works_of(call);
  const WorkSum sum = sum_of(call, works);
  CtaInterval before{0, 0, 0};
  for (int g = 0; g < call.available; ++g) {
    const CtaInterval interval = interval_of(params, sum, g, call.available, call.least);
    const auto starts = sequence_starts(call, works, interval.tile_cost);
    CHECK(starts[1] > 0x7fffffff, "the sequence is small; %s", words.c_str());
    CHECK(interval.begin == before.begin + before.length && interval.length > 0, "CTA %d; %s", g, words.c_str());
    CHECK((interval.tile_cost == 0) == (equal && cell_blocks == 0), "tile_cost of CTA %d; %s", g, words.c_str());
    before = interval;
    const int batch = interval.begin >= starts[1];
    IntervalCursor cursor{};
    cursor.work = works[batch];
    cursor.tile_cost = interval.tile_cost;
    cursor.left = interval.length;
    const long long position = interval.begin - starts[batch];
    cursor.stand_on(position);
    const long long cost = interval.tile_cost + n_blocks(cursor.work);
    CHECK(cursor.tile == position / cost && cursor.within == position % cost, "CTA %d stands on %d, %d; %s", g,
          cursor.tile, cursor.within, words.c_str());
    for (int i = 0; i < 3; ++i) {
      const int tile = cursor.tile;
      WorkItem item;
      if (!take_split_of(call, cursor, item)) continue;
      CHECK(item.head * works[batch].m_blocks + item.m_block == tile && item.range.end <= works[batch].end,
            "an item of CTA %d; %s", g, words.c_str());
    }
  }
  CHECK(before.begin + before.length == sum.positions(before.tile_cost), "the schedule's end; %s", words.c_str());
}

// Few splits of a tile on a schedule of more than 2^31 positions that is too short for all CTAs.
void check_long_tiles() {
  Call call;
  call.set_heads(40, 1, true);
  call.params.batch = 1;
  call.params.seqlen_q = 1;
  call.params.seqlen_k = 1 << 30;
  call.params.mask_rule.window_left = call.params.mask_rule.window_right = -1;
  call.params.num_splits = 2;
  call.params.tile_cost = 40;
  Random random(0);
  check_call(call, random);
}

}  // namespace

int main() {
  check_rules();
  for (const int cell_blocks : {0, 4, kOneSplit}) {
    for (const bool equal : {false, true}) check_large(cell_blocks, equal);
  }
  check_long_tiles();
  return host_test::finish();
}
