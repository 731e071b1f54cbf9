// Calls of the decode kernels for host tests: random lengths, masks and cuts, and the walk of a CTA over its items.
#pragma once

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "decode/stream_k.h"
#include "host/derived.h"

namespace host_test {

using broadhead::decode::CtaInterval;
using broadhead::decode::DecodeParams;
using broadhead::decode::IntervalCursor;
using broadhead::decode::SequenceWork;
using broadhead::decode::WorkItem;
using broadhead::decode::WorkSum;

constexpr int kOneSplit = 1 << 30;  // launch.cuh: num_splits = 1 makes a tile a single split

struct Call {
  DecodeParams params{};
  std::vector<std::int32_t> cu_q, cu_k, used_q, used_k, prefixes;  // empty: not given
  int tile_m = 16;
  int tile_n = 16;
  int available = 132;
  int least = 4;
  unsigned seed = 0;

  // Call once the lengths are there; they must not move afterwards.
  void connect() {
    const auto data = [](const std::vector<std::int32_t>& values) { return values.empty() ? nullptr : values.data(); };
    params.cu_seqlens_q = data(cu_q);
    params.cu_seqlens_k = data(cu_k);
    params.seqused_q = data(used_q);
    params.seqused_k = data(used_k);
    params.prefix_lens = data(prefixes);
    if (params.total_q == 0) params.total_q = cu_q.empty() ? params.batch * params.seqlen_q : cu_q.back();
    if (!cu_k.empty()) params.total_k = cu_k.back();
  }

  void set_heads(int kv_heads, int group, bool packed) {
    params.num_heads_kv = kv_heads;
    params.num_heads_q = kv_heads * group;
    params.pack_gqa = packed;
    derive(params);
  }

  std::string words() const {
    char text[512];
    std::snprintf(text, sizeof(text),
                  "seed %u: batch %d, seqlen_q %d, seqlen_k %d, heads in grid %d x %d rows, window (%d, %d), chunk %d, "
                  "prefix %d, num_splits %d, cell_blocks %d, tile %d x %d, tile_cost %d, %d CTAs of at least %d",
                  seed, params.batch, params.seqlen_q, params.seqlen_k, params.heads_in_grid,
                  static_cast<int>(params.rows_per_token), params.mask_rule.window_left, params.mask_rule.window_right,
                  params.mask_rule.attention_chunk, params.prefix_lens != nullptr, params.num_splits,
                  params.cell_blocks, tile_m, tile_n, params.tile_cost, available, least);
    return text;
  }
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int upto(int most) { return static_cast<int>(engine_() % (static_cast<unsigned>(most) + 1)); }
  int between(int least, int most) { return least + upto(most - least); }
  bool one_in(int n) { return upto(n - 1) == 0; }
  int of(std::initializer_list<int> values) { return values.begin()[upto(static_cast<int>(values.size()) - 1)]; }

 private:
  std::mt19937 engine_;
};

// Lengths of a batch, the longest `longest`: equal, mixed, or mostly empty.
inline std::vector<std::int32_t> random_lengths(Random& random, int batch, int longest) {
  const int kind = random.upto(3);
  std::vector<std::int32_t> lengths(batch);
  for (auto& length : lengths) {
    length = kind == 0 ? longest : random.upto(longest);
    if (kind == 3 && !random.one_in(8)) length = 0;
  }
  return lengths;
}

inline std::vector<std::int32_t> starts_of(const std::vector<std::int32_t>& lengths) {
  std::vector<std::int32_t> starts{0};
  for (const int length : lengths) starts.push_back(starts.back() + length);
  return starts;
}

inline void make_random_call(Call& call, unsigned seed) {
  Random random(seed);
  call.seed = seed;
  DecodeParams& params = call.params;
  params.batch = random.one_in(2) ? random.between(1, 6) : random.between(1, 200);
  call.tile_m = random.of({16, 32});
  call.tile_n = random.of({16, 32});
  call.available = random.one_in(3) ? random.of({1, 132, 264}) : random.between(1, 264);
  call.least = random.between(1, 8);
  params.tile_cost = random.between(1, 64);
  call.set_heads(random.between(1, 4), random.between(1, 8), random.one_in(2));
  params.num_splits = random.of({0, 0, 1, 2, 3, 7});
  if (params.num_splits == 1) {
    params.cell_blocks = kOneSplit;
  } else if (random.one_in(3)) {
    params.num_splits = 0;
    params.cell_blocks = random.of({1, 4});
  }

  const int longest_q = random.one_in(3) ? 1 : random.upto(9);
  const int longest_k = random.of({1, 40, 300, params.batch < 20 && params.cell_blocks != 1 ? 20000 : 2000});
  const std::vector<std::int32_t> lengths_q = random_lengths(random, params.batch, longest_q);
  const std::vector<std::int32_t> lengths_k = random_lengths(random, params.batch, longest_k);
  // Declared lengths may be too small; what the tensors hold clamps those that are not packed.
  params.seqlen_q = random.one_in(3) ? random.upto(longest_q) : longest_q;
  params.seqlen_k = random.one_in(3) ? random.upto(longest_k) : longest_k;
  if (random.one_in(2)) {
    call.cu_q = starts_of(lengths_q);
    if (random.one_in(4)) call.used_q = random_lengths(random, params.batch, longest_q + 2);
  } else if (random.one_in(2)) {
    call.used_q = lengths_q;
  }
  if (random.one_in(2)) {
    call.cu_k = starts_of(lengths_k);
  } else if (!random.one_in(4)) {
    call.used_k = lengths_k;
    if (random.one_in(4)) call.used_k[random.upto(params.batch - 1)] = -3;
  }

  const auto limit = [&] { return random.of({0, 1, 17, longest_k / 2}); };
  params.mask_rule.window_left = random.one_in(3) ? limit() : -1;
  params.mask_rule.window_right = random.one_in(2) ? (random.one_in(2) ? 0 : limit()) : -1;
  params.mask_rule.attention_chunk = random.one_in(6) ? random.of({1, 48, 100, 1024}) : 0;
  if (random.one_in(6)) call.prefixes = random_lengths(random, params.batch, longest_k);
  call.connect();
}

inline std::vector<SequenceWork> works_of(const Call& call) {
  std::vector<SequenceWork> works;
  for (int b = 0; b < broadhead::decode::sequences(call.params); ++b) {
    works.push_back(broadhead::decode::sequence_work(call.params, b, call.tile_m, call.tile_n));
  }
  return works;
}

inline WorkSum sum_of(const Call& call, const std::vector<SequenceWork>& works) {
  WorkSum sum;
  for (const SequenceWork& work : works) add(call.params, sum, work);
  return sum;
}

inline int tiles_of(const Call& call, const SequenceWork& work) { return work.m_blocks * call.params.heads_in_grid; }

inline bool take_split_of(const Call& call, IntervalCursor& cursor, WorkItem& item) {
  return call.tile_n == 16 ? broadhead::decode::take_split<16>(call.params, cursor, item)
                           : broadhead::decode::take_split<32>(call.params, cursor, item);
}

// Where the sequences begin in a schedule whose tiles take tile_cost positions besides, and its end.
inline std::vector<long long> sequence_starts(const Call& call, const std::vector<SequenceWork>& works, int tile_cost) {
  std::vector<long long> starts{0};
  for (const SequenceWork& work : works) {
    const long long cost = tile_cost + n_blocks(work);
    starts.push_back(starts.back() + tiles_of(call, work) * cost);
  }
  return starts;
}

// The items of an interval: what search and next_item find on the device.
inline std::vector<WorkItem> walk(const Call& call, const std::vector<SequenceWork>& works,
                                  const std::vector<long long>& starts, const CtaInterval& interval) {
  std::vector<WorkItem> items;
  if (interval.length == 0) return items;
  IntervalCursor cursor{};
  cursor.left = interval.length;
  cursor.tile_cost = interval.tile_cost;
  const auto behind = std::upper_bound(starts.begin(), starts.end(), interval.begin);
  cursor.batch = static_cast<int>(behind - starts.begin()) - 1;
  long long offset = interval.begin - starts[cursor.batch];
  for (; cursor.left != 0 && cursor.batch < static_cast<int>(works.size()); ++cursor.batch) {
    cursor.work = works[cursor.batch];
    const int tiles = tiles_of(call, cursor.work);
    if (tiles == 0) continue;
    cursor.stand_on(offset);
    offset = 0;
    while (cursor.left != 0 && cursor.tile < tiles) {
      WorkItem item;
      if (take_split_of(call, cursor, item)) items.push_back(item);
    }
  }
  CHECK(cursor.left == 0, "%d positions behind the end of the work; %s", cursor.left, call.words().c_str());
  return items;
}

}  // namespace host_test
