// The device side of the stream-K schedule: how a CTA finds its interval, and then its work items, from the lengths.
#pragma once

#include "decode/stream_k.h"

namespace broadhead::decode {

BROADHEAD_DEVICE SeqlenInfo shuffle(const SeqlenInfo& info, int source) {
  const auto from = [&](auto x) { return __shfl_sync(0xffffffffu, x, source); };
  return {from(info.row_q),    from(info.row_k),   from(info.seqlen_q),
          from(info.seqlen_k), from(info.batch_q), from(info.batch_k)};
}

// The inclusive prefix sum over the lanes; longest and shortest are reduced over all lanes. Only the first `lanes`
// lanes hold work.
BROADHEAD_DEVICE WorkSum warp_prefix(WorkSum sum, int lanes) {
#pragma unroll 1
  for (int i = 1; i < lanes; i *= 2) {
    const long long blocks = __shfl_up_sync(0xffffffffu, sum.n_blocks, i);
    const int tiles = __shfl_up_sync(0xffffffffu, sum.tiles, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) {
      sum.n_blocks += blocks;
      sum.tiles += tiles;
    }
  }
  sum.longest = __reduce_max_sync(0xffffffffu, sum.longest);
  sum.shortest = __reduce_min_sync(0xffffffffu, sum.shortest);
  return sum;
}

// Moves the cursor to the tile that lies cursor.offset positions behind the begin of sequence cursor.batch. A cursor
// without an interval (left < 0: at most 32 sequences) first computes the interval of this CTA. All lanes of a warp
// call this with equal arguments.
template <int kTileM, int kTileN, int kKeyGroups>
BROADHEAD_DEVICE void search(const DecodeParams& params, IntervalCursor& cursor) {
  const int lane = threadIdx.x % 32;
  while (true) {
    // Each lane looks at one of the next 32 sequences. A batch may be padded with many empty ones.
    const int sequence = cursor.batch + lane;
    SequenceWork work{{}, 0, 0, 1};
    WorkSum own;
    if (sequence < sequences(params)) {
      work = sequence_work(params, sequence, kTileM, kTileN);
      add(params, own, work);
    }
    const int lanes = min_int(32, sequences(params) - cursor.batch);
    const WorkSum prefix = warp_prefix(own, lanes);
    const WorkSum all{__shfl_sync(0xffffffffu, prefix.n_blocks, lanes - 1),
                      __shfl_sync(0xffffffffu, prefix.tiles, lanes - 1), prefix.longest, prefix.shortest};
    if (cursor.left < 0) {
      const CtaInterval interval = interval_of(params, all, blockIdx.x, gridDim.x, kKeyGroups);
      cursor.offset = interval.begin;
      cursor.tile_cost = interval.tile_cost;
      cursor.left = interval.length;
      if (cursor.left == 0) return;
    }
    const long long upto = prefix.positions(cursor.tile_cost);
    const unsigned behind = __ballot_sync(0xffffffffu, cursor.offset < upto);
    if (behind == 0) {
      // The work ends in front of the interval's end when another stream has shortened a sequence since then.
      if (cursor.batch + 32 >= sequences(params)) cursor.left = 0;
      if (cursor.left == 0) return;
      cursor.offset -= all.positions(cursor.tile_cost);
      cursor.batch += 32;
      continue;
    }
    const int source = __ffs(behind) - 1;
    cursor.offset -= __shfl_sync(0xffffffffu, upto - own.positions(cursor.tile_cost), source);
    cursor.batch += source;
    cursor.work = {shuffle(work.seqlen, source), __shfl_sync(0xffffffffu, work.m_blocks, source),
                   __shfl_sync(0xffffffffu, work.begin, source), __shfl_sync(0xffffffffu, work.end, source)};
    cursor.stand_on(cursor.offset);
    return;
  }
}

// The next item of this CTA; false when its interval is done. All lanes of a warp call this with equal arguments.
template <int kTileM, int kTileN, int kKeyGroups>
BROADHEAD_DEVICE bool next_item(const DecodeParams& params, IntervalCursor& cursor, WorkItem& item) {
  while (cursor.left != 0) {
    if (cursor.tile >= cursor.work.m_blocks * params.heads_in_grid) {
      if (cursor.work.m_blocks > 0) ++cursor.batch;
      search<kTileM, kTileN, kKeyGroups>(params, cursor);
      if (cursor.left == 0) return false;
    }
    if (take_split<kTileN>(params, cursor, item)) return true;
  }
  return false;
}

// Moves the cursors of all warps to the begin of this CTA's interval. All threads call this.
template <class Traits>
BROADHEAD_DEVICE void find_interval(const DecodeParams& params, typename Traits::SharedStorage& smem) {
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  if (sequences(params) <= 32) {  // a warp sees all sequences at once: its first search computes the interval
    if (lane == 0) smem.queue[thread / 32].cursor = {0, {{}, 0, 0, 1}, 0, 0, -1, 0, 0};
    __syncwarp();
    return;
  }
  const int each = ceil_div(sequences(params), Traits::kThreads);
  const int begin = min_int(thread * each, sequences(params));
  const int end = min_int(begin + each, sequences(params));
  WorkSum own;
  SequenceWork work{{}, 0, 0, 1};
#pragma unroll 1
  for (int b = begin; b < end; ++b) {
    work = sequence_work(params, b, Traits::kTileM, Traits::kTileN);
    add(params, own, work);
  }
  const WorkSum prefix = warp_prefix(own, 32);
  if (lane == 31) smem.sums[thread / 32] = prefix;
  __syncthreads();
  WorkSum before{prefix.n_blocks - own.n_blocks, prefix.tiles - own.tiles};
  WorkSum all;
  BROADHEAD_UNROLL
  for (int w = 0; w < Traits::kWarps; ++w) {
    const WorkSum sum = smem.sums[w];
    if (w < thread / 32) {
      before.n_blocks += sum.n_blocks;
      before.tiles += sum.tiles;
    }
    all.n_blocks += sum.n_blocks;
    all.tiles += sum.tiles;
    all.longest = max_int(all.longest, sum.longest);
    all.shortest = min_int(all.shortest, sum.shortest);
  }
  const CtaInterval interval = interval_of(params, all, blockIdx.x, gridDim.x, Traits::kKeyGroups);
  const bool works = interval.length > 0;
  const long long offset = interval.begin - before.positions(interval.tile_cost);
  const bool is_here = offset >= 0 && offset < own.positions(interval.tile_cost);
  if (works ? is_here : thread == 0) {
    IntervalCursor cursor{begin, {{}, 0, 0, 1}, 0, 0, interval.length, interval.tile_cost, offset};
    if (works && each == 1) {
      // A thread with one sequence stands in its tile already; else next_item searches among those of the thread.
      cursor.work = work;
      cursor.stand_on(offset);
    }
    BROADHEAD_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) smem.queue[w].cursor = cursor;
  }
  __syncthreads();
}

}  // namespace broadhead::decode
