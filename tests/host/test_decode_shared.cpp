// Keys that all sequences share in the stream-K schedule: for every query row the combine finds, by what the CTAs
// noted of their splits, all n_blocks of its own sequence and all shared ones, each once.
#include <algorithm>
#include <climits>
#include <vector>

#include "decode/workspace.h"
#include "decode_calls.h"

namespace {

using namespace host_test;
using broadhead::ceil_div;
using broadhead::decode::CtaSplits;
using broadhead::decode::interval_of;
using broadhead::decode::RowSplits;
using broadhead::decode::TileSplits;
using broadhead::decode::Workspace;

// How often the random calls had what the checks are about: none of them may be idle.
struct Seen {
  int whole, split, passes, straddling, padded, empty, many;
} seen{};

// As make_decode_params does.
void share_keys(Call& call) {
  call.connect();
  call.params.shared_sequences = 1;
  call.params.shared_tokens = static_cast<int>(call.params.total_q);
  call.params.live_tokens = call.cu_q.empty() ? nullptr : &call.cu_q.back();
}

void make_shared_call(Call& call, unsigned seed) {
  make_random_call(call, seed);
  Random random(seed);
  DecodeParams& params = call.params;
  params.cell_blocks = 0;
  params.num_splits = random.of({0, 0, 2, 3, 7});
  params.mask_rule.window_left = -1;
  params.mask_rule.window_right = random.of({-1, 0});
  params.mask_rule.attention_chunk = 0;
  call.used_q.clear();
  call.prefixes.clear();
  params.shared_seqlen_k = random.of({1, 17, 300, 8192, 20000});
  params.total_q = call.cu_q.empty() ? params.batch * params.seqlen_q : call.cu_q.back() + random.of({0, 0, 5});
  share_keys(call);
}

// The splits follow each other from `work`'s first n_block to its last, all of the tile that holds the row.
void check_row(const Call& call, const std::vector<const WorkItem*>& slots, const RowSplits& splits,
               const SequenceWork& work, int batch, int head, int row) {
  const std::string words = call.words();
  CHECK(splits.splits > 0 && splits.row == row % call.tile_m, "row %d of sequence %d: %d splits, row %d; %s", row,
        batch, splits.splits, splits.row, words.c_str());
  CHECK(call.params.num_splits == 0 || splits.splits <= call.params.num_splits, "%d splits; %s", splits.splits,
        words.c_str());
  int end = work.begin;
  for (int split = 0; split < splits.splits; ++split) {
    const auto slot = static_cast<std::size_t>(splits.slot(split));
    const WorkItem* item = slot < slots.size() ? slots[slot] : nullptr;
    CHECK(item != nullptr && item->batch == batch && item->head == head && item->m_block == row / call.tile_m &&
              item->range.begin == end,
          "split %d of %d, slot %zu, of row %d of sequence %d; %s", split, splits.splits, slot, row, batch,
          words.c_str());
    if (item == nullptr) return;
    end = item->range.end;
  }
  CHECK(end == work.end, "row %d of sequence %d ends at %d of %d; %s", row, batch, end, work.end, words.c_str());
  ++(splits.splits == 1 ? seen.whole : seen.split);
}

void check_call(const Call& call) {
  const DecodeParams& params = call.params;
  const std::string words = call.words();
  const int per_token = params.rows_per_token;
  // As launch_decode counts.
  Workspace workspace{};
  workspace.num_ctas = call.available;
  workspace.m_blocks = ceil_div(params.seqlen_q * per_token, call.tile_m);
  workspace.shared_m_blocks = ceil_div(static_cast<int>(params.total_q) * per_token, call.tile_m);
  const int tiles = (params.batch * workspace.m_blocks + workspace.shared_m_blocks) * params.heads_in_grid;
  if (workspace.m_blocks == 0 || params.total_q == 0) return;
  std::vector<TileSplits> noted(tiles, TileSplits{-1, -1});
  workspace.tiles = noted.data();
  std::vector<const WorkItem*> slots(2 * call.available + tiles);

  const auto works = works_of(call);
  const WorkSum sum = sum_of(call, works);
  std::vector<std::vector<WorkItem>> items;
  for (int g = 0; g < call.available; ++g) {
    const CtaInterval interval = interval_of(params, sum, g, call.available, call.least);
    items.push_back(walk(call, works, sequence_starts(call, works, interval.tile_cost), interval));
  }
  for (int g = 0; g < call.available; ++g) {
    for (const WorkItem& item : items[g]) {
      CHECK(item.is_split == 1, "a result of CTA %d is final; %s", g, words.c_str());
      CtaSplits unused{};
      note_split(params, workspace, item, g, unused);
      const auto slot = static_cast<std::size_t>(workspace.slot(params, item, g));
      CHECK(slot < slots.size() && slots[slot] == nullptr, "slot %zu of CTA %d; %s", slot, g, words.c_str());
      if (slot < slots.size()) slots[slot] = &item;
      seen.passes += item.split != 0 && item.goes_on != 0;
    }
  }

  const SequenceWork& shared = works.back();
  const int live = call.cu_q.empty() ? static_cast<int>(params.total_q) : call.cu_q.back();
  if (live == 0) return;
  CHECK(shared.seqlen.seqlen_q == live && shared.begin == 0 &&
            shared.end == ceil_div(params.shared_seqlen_k, call.tile_n),
        "the shared keys' sequence; %s", words.c_str());
  seen.padded += live < params.total_q;
  seen.many += params.batch > 32;
  for (int b = 0; b < params.batch; ++b) {
    const SequenceWork& work = works[b];
    const int first_token = call.cu_q.empty() ? b * params.seqlen_q : call.cu_q[b];
    const int rows = std::min(work.seqlen.seqlen_q, params.seqlen_q) * per_token;
    seen.empty += rows > 0 && work.seqlen.seqlen_k == 0;
    for (int row = 0; row < rows; ++row) {
      const int head = row % params.heads_in_grid;
      const long long tile = workspace.tile(params, b, head, row / call.tile_m);
      const RowSplits own = noted_splits(workspace, tile, noted[tile], row % call.tile_m);
      check_row(call, slots, own, work, b, head, row);
      const RowSplits others = shared_splits(params, workspace, work.seqlen, head, row, call.tile_m);
      const int shared_row = (first_token + row / per_token) * per_token + row % per_token;
      check_row(call, slots, others, shared, params.batch, head, shared_row);
      seen.straddling += shared_row / call.tile_m != first_token * per_token / call.tile_m;
    }
  }
}

// Lengths that contradict themselves: no split is looked for outside of the workspace.
void check_contradiction() {
  Call call;
  call.set_heads(1, 4, true);
  call.params.batch = 2;
  call.params.seqlen_q = 2;
  call.params.total_q = 4;
  call.params.shared_seqlen_k = 100;
  call.cu_q = {0, 1 << 20, 3};
  share_keys(call);
  Workspace workspace{};
  workspace.m_blocks = workspace.shared_m_blocks = 1;
  workspace.num_ctas = 7;
  std::vector<TileSplits> noted(3, TileSplits{0, 0});
  workspace.tiles = noted.data();
  for (int b = 0; b < 2; ++b) {
    const auto info = broadhead::decode::sequence_info(call.params, b);
    CHECK(info.row_q >= 0 && info.row_q + info.seqlen_q <= 4, "rows of sequence %d", b);
    for (int row = 0; row < 8; ++row) {
      const auto splits = shared_splits(call.params, workspace, info, 0, row, call.tile_m);
      CHECK(splits.splits <= 1, "row %d of sequence %d", row, b);
    }
  }
}

// What CTAs of the grid noted of a tile when another stream changed the lengths meanwhile, or that none did: splits
// are looked for in slots that there are.
void check_notes() {
  Workspace workspace{};
  workspace.num_ctas = 5;
  for (int first : {INT_MIN, -1, 0, 3, 4, 5, INT_MAX}) {
    for (int last : {INT_MIN, -1, 0, 2, 4, 5, INT_MAX}) {
      const RowSplits splits = noted_splits(workspace, 2, {first, last}, 3);
      CHECK(splits.splits >= 1, "splits of [%d, %d]", first, last);
      for (int split = 0; split < splits.splits; ++split) {
        const bool whole = splits.splits == 1;
        CHECK(splits.slot(split) >= 0 && splits.slot(split) < 2 * 5 + (whole ? 3 : 0), "slot of split %d of [%d, %d]",
              split, first, last);
      }
    }
  }
  for (int first = 0; first < 5; ++first) {
    for (int noted = 1; noted <= 7; ++noted) {
      const RowSplits splits = broadhead::decode::stream_k_splits(workspace, noted, 0, first);
      for (int split = 0; split < splits.splits; ++split)
        CHECK(splits.slot(split) < 10, "split %d from CTA %d", split, first);
    }
  }
}

}  // namespace

int main() {
  for (unsigned seed = 1; seed <= 6000; ++seed) {
    Call call;
    make_shared_call(call, seed);
    check_call(call);
  }
  check_contradiction();
  check_notes();
  CHECK(seen.whole && seen.split && seen.passes && seen.straddling && seen.padded && seen.empty && seen.many,
        "a kind of call was never drawn");
  return host_test::finish();
}
