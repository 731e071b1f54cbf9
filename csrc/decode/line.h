// The line of work: the key blocks of all (sequence, head, query tile), one after the other, cut among the blocks of
// the grid. Every block plans for itself from the lengths on the device, so no buffer that a host prepared can be
// wrong.
//
// A tile takes DecodeParams::tile_cost positions and one for each key block. Balanced: all blocks own intervals of
// equal length, and what a block owns of a tile is a part of it. In cells (params.cell_blocks > 0) every tile is cut at
// multiples of cell_blocks key blocks whatever else is in the batch; a block takes the cells that begin in its
// interval.
//
// Keys that all sequences share (params.shared_seqlen_k) are those of one more sequence on the line, whose queries are
// the query tokens of all others. Every item of such a call is a part: the combine adds a row's parts of either kind.
#pragma once

#include "decode/call.h"

namespace broadhead::decode {

// Blocks of a grid that are used at least when equal tiles are not cut where they meet: 7 of 8.
constexpr int kUsedOf = 8;
constexpr int kUsedAtLeast = 7;

// With shared keys, key blocks that a block of the grid gets at least, for each of its key groups: such calls are
// short, and what all parts of the shared keys leave is much to write and to merge.
constexpr int kSharedLeast = 2;

// The tiles of one sequence; every tile visits the same key blocks.
struct SequenceWork {
  SeqlenInfo seqlen;
  int m_blocks;  // tiles of a head; 0: no query
  int begin;  // first key block
  int end;  // at least begin + 1: a tile without keys still writes its rows
};

BROADHEAD_HOST_DEVICE SequenceWork sequence_work(const DecodeParams& params, int batch, int tile_m, int keys) {
  const SeqlenInfo seqlen = sequence_info(params, batch);
  if (seqlen.seqlen_q == 0) return {seqlen, 0, 0, 1};
  const BlockRange range = params.sees_all
                               ? BlockRange{0, ceil_div(seqlen.seqlen_k, keys)}
                               : block_range(make_mask(params, seqlen, batch), 0, seqlen.seqlen_q - 1, keys);
  return {seqlen, ceil_div(sequence_rows(params, seqlen, batch), tile_m), range.begin,
          max_int(range.end, range.begin + 1)};
}

BROADHEAD_HOST_DEVICE int key_blocks(const SequenceWork& work) { return work.end - work.begin; }

// What sequences have on the line.
struct LineSum {
  long long key_blocks = 0;
  int tiles = 0;
  int longest = 0;  // key blocks of a tile
  int shortest = 0x7fffffff;

  BROADHEAD_HOST_DEVICE long long positions(int tile_cost) const {
    return key_blocks + static_cast<long long>(tiles) * tile_cost;
  }
};

BROADHEAD_HOST_DEVICE void add(const DecodeParams& params, LineSum& sum, const SequenceWork& work) {
  const int tiles = work.m_blocks * params.heads_in_grid;
  if (tiles == 0) return;
  sum.key_blocks += static_cast<long long>(tiles) * key_blocks(work);
  sum.tiles += tiles;
  sum.longest = max_int(sum.longest, key_blocks(work));
  sum.shortest = min_int(sum.shortest, key_blocks(work));
}

// One part of a tile.
struct LineItem {
  SeqlenInfo seqlen;
  int batch;
  int head;  // KV head when packed
  int m_block;
  BlockRange range;  // key blocks
  int part;  // cells: of the tile; balanced: 0 when the part begins with the tile's first key block
  int is_part;  // 0: the whole tile, written at once; with shared keys always 1
  int goes_on;  // balanced: the tile does not end in this part
};

// Whether two warps of a block have found the same; `word` in [0, kItemWords): the part that is compared.
constexpr int kItemWords = sizeof(LineItem) / 4;
static_assert(sizeof(LineItem) % 4 == 0 && kItemWords <= 32, "a lane compares a word");

BROADHEAD_HOST_DEVICE int kv_head_of(const DecodeParams& params, const LineItem& item) {
  return params.heads_per_kv == 1 ? item.head : item.head / params.heads_per_kv;
}

// Cells of a tile. The last one takes what lies behind the keys that the call declared (max_seqlen_k): the workspace
// has room for those.
BROADHEAD_HOST_DEVICE int cells_of(const DecodeParams& params, const SequenceWork& work, int keys) {
  const int declared = max_int(1, ceil_div(ceil_div(params.seqlen_k, keys), params.cell_blocks));
  return min_int(declared, (work.end - 1) / params.cell_blocks - work.begin / params.cell_blocks + 1);
}

// An interval of the line, on which a tile takes tile_cost positions besides its key blocks.
struct LineInterval {
  long long begin;
  int length;
  int tile_cost;
};

// What block `block` of `available` owns. `least`: positions that every block gets at least, one for each of its key
// groups: with fewer, warps stand idle.
BROADHEAD_HOST_DEVICE LineInterval interval_of(const DecodeParams& params, const LineSum& sum, int block, int available,
                                               int least) {
  int tile_cost = params.tile_cost;
  long long total = sum.positions(tile_cost);
  int blocks = available;
  if (params.shared_seqlen_k > 0) least *= kSharedLeast;
  if (params.cell_blocks == 0) {
    int most = max_int(1, sum.longest / least);  // parts of a tile
    if (params.num_splits > 1) {
      // A tile of n key blocks touches at most ceil((n - 1) / least) + 1 intervals.
      least = max_int(least, ceil_div(sum.longest - 1, params.num_splits - 1));
      most = min_int(most, params.num_splits);
    }
    if (total < static_cast<long long>(least) * available) {
      // With num_splits `least` may be millions, and the line longer than an int.
      blocks = max_int(1, total <= 0x7fffffff ? static_cast<int>(total) / least : static_cast<int>(total / least));
    }
    // Equal tiles are not cut where tiles meet when that leaves few blocks without work: a block that ends one tile and
    // begins another pauses its copies for some 4 us, and the memory is busy before the last blocks are.
    const int tiles = sum.tiles;
    if (sum.shortest == sum.longest) {
      const int each = ceil_div(tiles, available);  // tiles of a block
      const int parts = min_int(most, available / tiles);
      const int used = each > 1 ? ceil_div(tiles, each) : parts * tiles;
      if (blocks < available || used * kUsedOf >= blocks * kUsedAtLeast) {
        tile_cost = 0;
        total = sum.key_blocks;
        blocks = used;
        if (each > 1) {
          const long long length = static_cast<long long>(each) * sum.longest;
          const long long begin = block * length;
          const long long rest = total - begin;
          return {begin, rest <= 0 ? 0 : static_cast<int>(rest < length ? rest : length), 0};
        }
      }
    }
  }
  if (block >= blocks) return {total, 0, tile_cost};
  const bool is_small = total <= 0x7fffffff;  // a 64-bit division costs a hundred instructions
  const long long each = is_small ? static_cast<int>(total) / blocks : total / blocks;
  const int rest = static_cast<int>(total - each * blocks);
  const int begin = rest * block / blocks;  // cuts of equal tiles fall on their ends
  return {each * block + begin, static_cast<int>(each) + rest * (block + 1) / blocks - begin, tile_cost};
}

// Walks over the items of one block of the grid.
struct LineCursor {
  int batch;  // the sequence; before the first search: where to search from
  SequenceWork work;
  int tile;  // of the sequence
  int within;  // position in the tile
  int left;  // positions of the interval from there on; -1: the first search is to plan
  int tile_cost;
  long long offset;  // of the interval's begin behind that of `batch`, until the first search

  // Stands on a position of the sequence.
  BROADHEAD_HOST_DEVICE void stand_on(long long position) {
    const int cost = tile_cost + key_blocks(work);
    // Only prefill has sequences of more positions than an int: a 64-bit division costs a hundred instructions.
    tile = position <= 0x7fffffff ? static_cast<int>(position) / cost : static_cast<int>(position / cost);
    within = static_cast<int>(position - static_cast<long long>(tile) * cost);
    offset = 0;
  }
};

// The next item once the cursor stands in a tile; false when nothing of the tile is for this block. Moves the cursor.
template <int kKeys>
BROADHEAD_HOST_DEVICE bool take_part(const DecodeParams& params, LineCursor& cursor, LineItem& item) {
  const SequenceWork& work = cursor.work;
  const int tile_cost = cursor.tile_cost;
  const int cost = tile_cost + key_blocks(work);
  int begin, end;  // key blocks behind work.begin
  item.part = 0;
  item.is_part = 0;
  item.goes_on = 0;
  if (params.cell_blocks == 0) {
    const int take = min_int(cost - cursor.within, cursor.left);
    begin = max_int(0, cursor.within - tile_cost);
    end = max_int(0, cursor.within + take - tile_cost);
    item.goes_on = cursor.within + take < cost;
    item.part = begin > 0;
    item.is_part = item.goes_on | item.part | (params.shared_seqlen_k > 0);
    cursor.left -= take;
    cursor.within += take;
  } else {
    const int size = params.cell_blocks;
    const int first = work.begin / size;
    int cell = 0;
    if (cursor.within > 0) {
      cell = max_int(1, ceil_div(cursor.within - tile_cost + work.begin, size) - first);
    }
    const int cells = cells_of(params, work, kKeys);
    begin = cell == 0 ? 0 : (first + cell) * size - work.begin;
    if (cell >= cells) begin = cost - tile_cost;
    end = cell >= cells - 1 ? cost - tile_cost : (first + cell + 1) * size - work.begin;
    const int start = cell == 0 ? 0 : tile_cost + begin;  // a cell is its block's in whose interval it begins
    cursor.left = max_int(0, cursor.left - (start - cursor.within));
    if (cursor.left == 0) return false;
    cursor.left = max_int(0, cursor.left - (tile_cost + end - start));
    cursor.within = tile_cost + end;
    item.part = cell;
    item.is_part = cells > 1;
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
