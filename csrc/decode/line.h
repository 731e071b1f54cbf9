// The line of work: the key blocks of all (sequence, head, query tile), one after the other, cut among the blocks of
// the grid. Every block plans for itself from the lengths on the device, so no buffer that a host prepared can be
// wrong.
//
// A tile takes kTileCost positions and one for each key block. Balanced: all blocks own intervals of equal length, and
// what a block owns of a tile is a part of it. In cells (params.cell_blocks > 0) every tile is cut at multiples of
// cell_blocks key blocks whatever else is in the batch; a block takes the cells that begin in its interval.
#pragma once

#include "common/attention_mask.h"
#include "common/seqlen_info.h"

namespace broadhead::decode {

// What a tile costs besides its key blocks, in key blocks: Q, the merge of the warps, the output.
constexpr int kTileCost = 2;

BROADHEAD_HOST_DEVICE int rows_per_token(const AttnParams& params) {
  return params.pack_gqa ? params.num_heads_q / params.num_heads_kv : 1;
}
BROADHEAD_HOST_DEVICE int heads_in_grid(const AttnParams& params) {
  return params.pack_gqa ? params.num_heads_kv : params.num_heads_q;
}

BROADHEAD_HOST_DEVICE AttentionMask make_mask(const AttnParams& params, const SeqlenInfo& seqlen, int batch) {
  return {seqlen.seqlen_q,        seqlen.seqlen_k,
          params.window_left,     params.window_right,
          params.attention_chunk, params.prefix_lens ? min_int(params.prefix_lens[batch], seqlen.seqlen_k) : 0};
}

// The tiles of one sequence; every tile visits the same key blocks.
struct SequenceWork {
  int tiles;
  int begin;  // first key block
  int end;    // at least begin + 1: a tile without keys still writes its rows

  BROADHEAD_HOST_DEVICE int cost() const { return kTileCost + end - begin; }
  BROADHEAD_HOST_DEVICE long long positions() const { return static_cast<long long>(tiles) * cost(); }
};

BROADHEAD_HOST_DEVICE SequenceWork sequence_work(const AttnParams& params, int batch, int tile_m, int keys) {
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  if (seqlen.seqlen_q == 0) return {0, 0, 1};
  const BlockRange range = block_range(make_mask(params, seqlen, batch), 0, seqlen.seqlen_q - 1, keys);
  const int m_blocks = ceil_div(seqlen.seqlen_q * rows_per_token(params), tile_m);
  return {m_blocks * heads_in_grid(params), range.begin, max_int(range.end, range.begin + 1)};
}

// One part of a tile.
struct LineItem {
  int batch;
  int head;  // KV head when packed
  int m_block;
  BlockRange range;  // key blocks
  int part;          // cells: of the tile; balanced: 0 when the part begins with the tile's first key block
  int is_part;       // 0: the whole tile
  int goes_on;       // balanced: the tile does not end in this part
};

BROADHEAD_HOST_DEVICE int cells_of(const SequenceWork& work, int cell_blocks) {
  return (work.end - 1) / cell_blocks - work.begin / cell_blocks + 1;
}

// How many blocks of the grid share the line. `longest`: key blocks of the longest tile. `least`: positions that every
// block gets at least, one for each of its key groups: with fewer, warps stand idle.
BROADHEAD_HOST_DEVICE int blocks_for(const AttnParams& params, long long total, int longest, int available, int least) {
  if (params.cell_blocks > 0) return available;
  // A tile of n key blocks touches at most (n - 1) / least + 2 intervals.
  if (params.num_splits > 1) least = max_int(least, ceil_div(longest - 1, params.num_splits - 1));
  if (total >= static_cast<long long>(least) * available) return available;
  return max_int(1, static_cast<int>(total) / least);  // total is below least * available
}

// An interval of the line.
struct LineInterval {
  long long begin;
  int length;
};

// Block `block` of `blocks`; the first ones are a position longer.
BROADHEAD_HOST_DEVICE LineInterval interval_of(long long total, int block, int blocks) {
  long long each;
  int rest;
  if (total <= 0x7fffffff) {
    each = static_cast<int>(total) / blocks;
    rest = static_cast<int>(total) - static_cast<int>(each) * blocks;
  } else {
    each = total / blocks;
    rest = static_cast<int>(total - each * blocks);
  }
  return {each * block + min_int(block, rest), static_cast<int>(each) + (block < rest ? 1 : 0)};
}

// Walks over the items of one block of the grid.
struct LineCursor {
  int batch;         // the sequence; before the first search: where to search from
  SequenceWork work;
  int tile;    // of the sequence
  int within;  // position in the tile
  int left;    // positions of the interval from there on
  long long offset;  // of the interval's begin behind that of `batch`, until the first search
};

// The next item once the cursor stands in a tile; false when nothing of the tile is for this block. Moves the cursor.
BROADHEAD_HOST_DEVICE bool take_part(const AttnParams& params, LineCursor& cursor, LineItem& item) {
  const SequenceWork& work = cursor.work;
  const int cost = work.cost();
  int begin, end;  // key blocks behind work.begin
  item.part = 0;
  item.is_part = 0;
  item.goes_on = 0;
  if (params.cell_blocks == 0) {
    const int take = min_int(cost - cursor.within, cursor.left);
    begin = max_int(0, cursor.within - kTileCost);
    end = max_int(0, cursor.within + take - kTileCost);
    item.goes_on = cursor.within + take < cost;
    item.part = begin > 0;
    item.is_part = item.goes_on | item.part;
    cursor.left -= take;
    cursor.within += take;
  } else {
    const int size = params.cell_blocks;
    const int first = work.begin / size;
    int cell = 0;
    if (cursor.within > 0) {
      cell = max_int(1, ceil_div(cursor.within - kTileCost + work.begin, size) - first);
    }
    const int cells = cells_of(work, size);
    begin = cell == 0 ? 0 : (first + cell) * size - work.begin;
    if (cell >= cells) begin = cost - kTileCost;
    end = cell >= cells - 1 ? cost - kTileCost : (first + cell + 1) * size - work.begin;
    const int start = cell == 0 ? 0 : kTileCost + begin;  // a cell is its block's in whose interval it begins
    cursor.left -= start - cursor.within;
    if (cursor.left <= 0) return false;
    cursor.left -= kTileCost + end - start;
    cursor.within = kTileCost + end;
    item.part = cell;
    item.is_part = cells > 1;
  }
  item.batch = cursor.batch;
  const int m_blocks = work.tiles / heads_in_grid(params);
  item.head = m_blocks == 1 ? cursor.tile : cursor.tile / m_blocks;
  item.m_block = cursor.tile - item.head * m_blocks;
  item.range = {work.begin + begin, work.begin + end};
  if (cursor.within >= cost) {
    ++cursor.tile;
    cursor.within = 0;
  }
  return begin < end;
}

#if defined(__CUDACC__)

// Sets the cursor on the tile `offset` positions behind the begin of sequence `batch`. All lanes of a warp call this
// with equal arguments; the position exists.
template <int kTileM, int kKeys>
BROADHEAD_DEVICE void search(const AttnParams& params, LineCursor& cursor) {
  const int lane = threadIdx.x % 32;
  while (true) {
    // Which of the next 32 sequences? Batches are padded with empty ones.
    const int own = cursor.batch + lane;
    const SequenceWork work = own < params.batch ? sequence_work(params, own, kTileM, kKeys) : SequenceWork{0, 0, 1};
    long long upto = work.positions();
    BROADHEAD_UNROLL
    for (int i = 1; i < 32; i *= 2) {
      const long long other = __shfl_up_sync(0xffffffffu, upto, i);
      if (lane >= i) upto += other;
    }
    const unsigned behind = __ballot_sync(0xffffffffu, cursor.offset < upto);
    if (behind == 0 && cursor.batch + 32 < params.batch) {
      cursor.offset -= __shfl_sync(0xffffffffu, upto, 31);
      cursor.batch += 32;
      continue;
    }
    const int source = max_int(0, __ffs(behind) - 1);
    cursor.offset -= __shfl_sync(0xffffffffu, upto - work.positions(), source);
    cursor.batch += source;
    cursor.work.tiles = __shfl_sync(0xffffffffu, work.tiles, source);
    cursor.work.begin = __shfl_sync(0xffffffffu, work.begin, source);
    cursor.work.end = __shfl_sync(0xffffffffu, work.end, source);
    cursor.tile = static_cast<int>(cursor.offset) / cursor.work.cost();
    cursor.within = static_cast<int>(cursor.offset) - cursor.tile * cursor.work.cost();
    cursor.offset = 0;
    return;
  }
}

// The next item of the block; false: its interval is done. All lanes of a warp call this with equal arguments.
template <int kTileM, int kKeys>
BROADHEAD_DEVICE bool next_item(const AttnParams& params, LineCursor& cursor, LineItem& item) {
  while (cursor.left > 0) {
    if (cursor.tile >= cursor.work.tiles) {
      if (cursor.work.tiles > 0) ++cursor.batch;
      search<kTileM, kKeys>(params, cursor);
    }
    if (take_part(params, cursor, item)) return true;
  }
  return false;
}

// Sets the cursors of all warps on the begin of the block's interval. All threads; it ends with a barrier.
template <class Traits>
BROADHEAD_DEVICE void make_plan(const AttnParams& params, typename Traits::SharedStorage& smem) {
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int each = ceil_div(params.batch, Traits::kThreads);
  const int begin = min_int(thread * each, params.batch);
  const int end = min_int(begin + each, params.batch);
  long long own = 0;
  int longest = 1;
  SequenceWork work{0, 0, 1};
#pragma unroll 1
  for (int b = begin; b < end; ++b) {
    work = sequence_work(params, b, Traits::kTileM, Traits::kKeys);
    own += work.positions();
    longest = max_int(longest, work.end - work.begin);
  }
  long long upto = own;
  BROADHEAD_UNROLL
  for (int i = 1; i < 32; i *= 2) {
    const long long other = __shfl_up_sync(0xffffffffu, upto, i);
    if (lane >= i) upto += other;
  }
  if (params.num_splits > 1) {
    BROADHEAD_UNROLL
    for (int i = 1; i < 32; i *= 2) longest = max_int(longest, __shfl_xor_sync(0xffffffffu, longest, i));
  }
  if (lane == 31) {
    smem.scratch[thread / 32] = upto;
    smem.longest[thread / 32] = longest;
  }
  __syncthreads();
  long long before = upto - own;
  long long total = 0;
  BROADHEAD_UNROLL
  for (int w = 0; w < Traits::kWarps; ++w) {
    const long long sum = smem.scratch[w];
    if (w < thread / 32) before += sum;
    total += sum;
    longest = max_int(longest, smem.longest[w]);
  }
  const int blocks = blocks_for(params, total, longest, gridDim.x, Traits::kKeyGroups);
  const int block = blockIdx.x;
  const LineInterval interval = interval_of(total, block, blocks);
  const bool works = block < blocks && interval.length > 0;
  const bool is_here = interval.begin >= before && interval.begin < before + own;
  if (works ? is_here : thread == 0) {
    LineCursor cursor{begin, {0, 0, 1}, 0, 0, works ? interval.length : 0, interval.begin - before};
    if (works && each == 1) {
      // A thread with one sequence stands in its tile already; else next_item searches among those of the thread.
      const int offset = static_cast<int>(cursor.offset);
      cursor.work = work;
      cursor.tile = offset / work.cost();
      cursor.within = offset - cursor.tile * work.cost();
      cursor.offset = 0;
    }
    BROADHEAD_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) smem.queue[w].cursor = cursor;
  }
  __syncthreads();
}

#endif

}  // namespace broadhead::decode
