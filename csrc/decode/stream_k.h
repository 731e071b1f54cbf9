// The stream-K schedule: the n_blocks of all tiles (sequence, head, m_block) stand one after the other, and each CTA of
// the grid owns an interval of them. Every CTA computes its interval from the lengths on the device, so there is no
// buffer that a host could prepare wrongly.
//
// A tile takes DecodeParams::tile_cost positions of that order, and one more for each n_block. There are two modes:
// - Stream-K: all CTAs own intervals of equal length. What a CTA owns of a tile is a split of it.
// - Fixed splits (params.cell_blocks > 0): every tile is cut at multiples of cell_blocks n_blocks, whatever else is in
//   the batch. A CTA takes the splits that begin in its interval.
//
// The keys that all sequences share (params.shared_seqlen_k) are scheduled as one more sequence, whose queries are the
// query tokens of all others. Every item of such a call is a split: the combine adds a row's splits of both sequences.
#pragma once

#include "decode/decode_params.h"

namespace broadhead::decode {

// Equal tiles are cut where they meet only if that keeps at least 7 of 8 CTAs of the grid at work.
constexpr int kCtasOf = 8;
constexpr int kCtasUsedAtLeast = 7;

// With shared keys a CTA gets at least this many n_blocks for each of its key groups: such calls are short, and every
// split of the shared keys leaves partial results that must be written and combined.
constexpr int kSharedLeastNBlocks = 2;

// The tiles of one sequence; every tile visits the same n_blocks.
struct SequenceWork {
  SeqlenInfo seqlen;
  int m_blocks;  // tiles of a head; 0: no query
  int begin;     // first n_block
  int end;       // at least begin + 1: a tile without keys still writes its rows
};

// The n_blocks that some query of a sequence sees. Those between what it sees by position and what it is given count.
BROADHEAD_HOST_DEVICE BlockRange masked_range(const DecodeParams& params, const SeqlenInfo& seqlen, int batch,
                                              int tile_n) {
  const AttentionMask mask = make_mask(params, seqlen, batch);
  const int last = seqlen.seqlen_q - 1;
  KeyInterval given{0, 0};
  if (gives_masks(params)) given = existing_keys(mask, params.sequence_masks[batch].within);
  return block_range(mask, 0, last, tile_n, given);
}

BROADHEAD_HOST_DEVICE SequenceWork sequence_work(const DecodeParams& params, int batch, int tile_m, int tile_n) {
  const SeqlenInfo seqlen = sequence_info(params, batch);
  if (seqlen.seqlen_q == 0) return {seqlen, 0, 0, 1};
  const BlockRange range =
      params.sees_all ? BlockRange{0, ceil_div(seqlen.seqlen_k, tile_n)} : masked_range(params, seqlen, batch, tile_n);
  return {seqlen, ceil_div(sequence_rows(params, seqlen, batch), tile_m), range.begin,
          max_int(range.end, range.begin + 1)};
}

BROADHEAD_HOST_DEVICE int n_blocks(const SequenceWork& work) { return work.end - work.begin; }

// The work of several sequences together.
struct WorkSum {
  long long n_blocks = 0;
  int tiles = 0;
  int longest = 0;  // n_blocks of a tile
  int shortest = 0x7fffffff;

  BROADHEAD_HOST_DEVICE long long positions(int tile_cost) const {
    return n_blocks + static_cast<long long>(tiles) * tile_cost;
  }
};

BROADHEAD_HOST_DEVICE void add(const DecodeParams& params, WorkSum& sum, const SequenceWork& work) {
  const int tiles = work.m_blocks * params.heads_in_grid;
  if (tiles == 0) return;
  sum.n_blocks += static_cast<long long>(tiles) * n_blocks(work);
  sum.tiles += tiles;
  sum.longest = max_int(sum.longest, n_blocks(work));
  sum.shortest = min_int(sum.shortest, n_blocks(work));
}

// What a CTA works on at a time: a whole tile, or a split of one.
struct WorkItem {
  SeqlenInfo seqlen;
  int batch;
  int head;  // KV head when packed
  int m_block;
  BlockRange range;  // n_blocks
  int split;  // fixed splits: the split's index in the tile; stream-K: 0 when it begins with the tile's first n_block
  int is_split;  // 0: the item is the whole tile and writes the final result; with shared keys always 1
  int goes_on;   // stream-K: the tile does not end in this split
};

// The warps of a CTA compare the items that they found word by word, a lane a word.
constexpr int kItemWords = sizeof(WorkItem) / 4;
static_assert(sizeof(WorkItem) % 4 == 0 && kItemWords <= 32, "a lane compares a word");

// The number of fixed splits of a tile. The workspace has room for as many as the declared keys (max_seqlen_k) make, so
// the last split also takes what lies behind those.
BROADHEAD_HOST_DEVICE int num_fixed_splits(const DecodeParams& params, const SequenceWork& work, int tile_n) {
  const int declared = max_int(1, ceil_div(ceil_div(params.seqlen_k, tile_n), params.cell_blocks));
  return min_int(declared, (work.end - 1) / params.cell_blocks - work.begin / params.cell_blocks + 1);
}

// The positions that a CTA owns. A tile takes tile_cost positions in front of its n_blocks.
struct CtaInterval {
  long long begin;
  int length;
  int tile_cost;
};

// The interval of CTA `cta` of `available`. Every CTA that works gets at least `least` positions, one for each of its
// key groups, since warps stand idle with fewer.
BROADHEAD_HOST_DEVICE CtaInterval interval_of(const DecodeParams& params, const WorkSum& sum, int cta, int available,
                                              int least) {
  int tile_cost = params.tile_cost;
  long long total = sum.positions(tile_cost);
  int ctas = available;
  if (params.shared_seqlen_k > 0) least *= kSharedLeastNBlocks;
  if (params.cell_blocks == 0) {
    int most = max_int(1, sum.longest / least);  // splits of a tile
    if (params.num_splits > 1) {
      // A tile of n n_blocks touches at most ceil((n - 1) / least) + 1 intervals.
      least = max_int(least, ceil_div(sum.longest - 1, params.num_splits - 1));
      most = min_int(most, params.num_splits);
    }
    if (total < static_cast<long long>(least) * available) {
      // With num_splits `least` may be millions, and `total` longer than an int.
      ctas = max_int(1, total <= 0x7fffffff ? static_cast<int>(total) / least : static_cast<int>(total / least));
    }
    // Equal tiles are not cut where tiles meet when that leaves few CTAs without work: a CTA that ends one tile and
    // begins another pauses its copies for some 4 us, and the memory is busy before the last CTAs are.
    const int tiles = sum.tiles;
    if (sum.shortest == sum.longest) {
      const int each = ceil_div(tiles, available);  // tiles of a CTA
      const int splits = min_int(most, available / tiles);
      const int used = each > 1 ? ceil_div(tiles, each) : splits * tiles;
      if (ctas < available || used * kCtasOf >= ctas * kCtasUsedAtLeast) {
        tile_cost = 0;
        total = sum.n_blocks;
        ctas = used;
        if (each > 1) {
          const long long length = static_cast<long long>(each) * sum.longest;
          const long long begin = cta * length;
          const long long rest = total - begin;
          return {begin, rest <= 0 ? 0 : static_cast<int>(rest < length ? rest : length), 0};
        }
      }
    }
  }
  if (cta >= ctas) return {total, 0, tile_cost};
  const bool is_small = total <= 0x7fffffff;  // a 64-bit division costs a hundred instructions
  const long long each = is_small ? static_cast<int>(total) / ctas : total / ctas;
  const int rest = static_cast<int>(total - each * ctas);
  const int begin = rest * cta / ctas;  // cuts of equal tiles fall on their ends
  return {each * cta + begin, static_cast<int>(each) + rest * (cta + 1) / ctas - begin, tile_cost};
}

// Where a CTA stands in its interval.
struct IntervalCursor {
  int batch;  // the sequence; before the first search: where to search from
  SequenceWork work;
  int tile;    // of the sequence
  int within;  // position in the tile
  int left;    // positions of the interval from there on; -1: the first search is to plan
  int tile_cost;
  long long offset;  // of the interval's begin behind that of `batch`, until the first search

  // Stands on a position of the sequence.
  BROADHEAD_HOST_DEVICE void stand_on(long long position) {
    const int cost = tile_cost + n_blocks(work);
    // Only prefill has sequences of more positions than an int: a 64-bit division costs a hundred instructions.
    tile = position <= 0x7fffffff ? static_cast<int>(position) / cost : static_cast<int>(position / cost);
    within = static_cast<int>(position - static_cast<long long>(tile) * cost);
    offset = 0;
  }
};

// Takes the next item from the tile that the cursor stands in, and moves the cursor; false when the tile has none for
// this CTA.
template <int kTileN>
BROADHEAD_HOST_DEVICE bool take_split(const DecodeParams& params, IntervalCursor& cursor, WorkItem& item) {
  const SequenceWork& work = cursor.work;
  const int tile_cost = cursor.tile_cost;
  const int cost = tile_cost + n_blocks(work);
  int begin, end;  // n_blocks behind work.begin
  item.split = 0;
  item.is_split = 0;
  item.goes_on = 0;
  if (params.cell_blocks == 0) {
    const int take = min_int(cost - cursor.within, cursor.left);
    begin = max_int(0, cursor.within - tile_cost);
    end = max_int(0, cursor.within + take - tile_cost);
    item.goes_on = cursor.within + take < cost;
    item.split = begin > 0;
    item.is_split = item.goes_on | item.split | (params.shared_seqlen_k > 0);
    cursor.left -= take;
    cursor.within += take;
  } else {
    const int size = params.cell_blocks;
    const int first = work.begin / size;
    int split = 0;
    if (cursor.within > 0) {
      split = max_int(1, ceil_div(cursor.within - tile_cost + work.begin, size) - first);
    }
    const int splits = num_fixed_splits(params, work, kTileN);
    begin = split == 0 ? 0 : (first + split) * size - work.begin;
    if (split >= splits) begin = cost - tile_cost;
    end = split >= splits - 1 ? cost - tile_cost : (first + split + 1) * size - work.begin;
    const int start = split == 0 ? 0 : tile_cost + begin;  // a split belongs to the CTA in whose interval it begins
    cursor.left = max_int(0, cursor.left - (start - cursor.within));
    if (cursor.left == 0) return false;
    cursor.left = max_int(0, cursor.left - (tile_cost + end - start));
    cursor.within = tile_cost + end;
    item.split = split;
    item.is_split = splits > 1;
  }
  item.seqlen = work.seqlen;
  item.batch = cursor.batch;
  item.head = work.m_blocks == 1 ? cursor.tile : cursor.tile / work.m_blocks;
  item.m_block = cursor.tile - item.head * work.m_blocks;
  item.range = {work.begin + begin, work.begin + end};
  if (cursor.within >= cost) {
    ++cursor.tile;
    cursor.within = 0;
  }
  return begin < end;
}

}  // namespace broadhead::decode
