// The producer's copies: stages of K and V by TMA boxes or gathered by cp.async, and the tile of Q.
#pragma once

#include "sm90/forward_traits.h"

namespace broadhead::sm90 {

// A producer's tiles in order; `body` gets each one's state. `arrives`: of the lanes of a warp, the one that frees a
// tile's slot.
template <class Storage, class Body>
BROADHEAD_DEVICE void for_each_tile(Storage& smem, bool arrives, const Body& body) {
  SlotState slot;
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const auto& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    body(tile.state);
    __syncwarp();
    if (arrives) barrier_arrive(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

// Tells the scheduler once a tile that its loads are near the end: `block` is the next one, or at the tile's beginning
// range.end.
BROADHEAD_DEVICE void want_next(Barrier& next_wanted, const BlockRange& range, int block) {
  const int at = min_int(range.begin + kBlocksAhead, range.end);
  if (block == at) barrier_arrive(next_wanted);
}

// Whether any of keys [key, key + rows) is seen by a query of the tile.
template <class Element>
BROADHEAD_DEVICE bool any_live(const KvSource<Element>& source, int key, int rows) {
  return (key < source.live.end && key + rows > source.live.begin) || key < source.prefix_len;
}

// What a loader needs of a tile, in the coordinates of a map.
struct KvCoordinates {
  int row0;  // of key 0
  int x;     // of the head, and of the sequence unless paged
};

template <class Element>
BROADHEAD_DEVICE KvCoordinates kv_coordinates(const KvMap& map, const AttnParams& params,
                                              const TileState<Element>& state) {
  const int group = params.num_heads_q / params.num_heads_kv;
  const int head = params.pack_gqa ? state.output.head : state.output.head / group;
  if (params.page_table != nullptr) return {0, head * map.head_step};
  return {static_cast<int>(state.seqlen.row_k), head * map.head_step + state.seqlen.batch_k * map.batch_step};
}

// Where lane u's box of a block of keys lies. page -1: nothing to load.
struct BoxPlace {
  int page;
  int slot;  // of its first row in the page
};

// Lane u's share of the `keys` keys from `key0` on. Entries of boxes that no query sees are never read: they may be
// garbage.
template <class Element>
BROADHEAD_DEVICE BoxPlace box_place(const KvSource<Element>& source, int key0, int keys, int box_rows, int page_size) {
  const int offset = static_cast<int>(threadIdx.x % 32) * box_rows;
  const int key = key0 + offset;
  if (offset >= keys || !any_live(source, key, box_rows)) return {-1, 0};
  const int entry = key / page_size;
  return {source.table[entry], key - entry * page_size};
}

// 8-row groups from `row` on, one box each: the end of the rows, and columns that no box of several subtiles fits.
template <class Layout, int kCluster, class Issue>
BROADHEAD_DEVICE void issue_groups(const KvMap& map, std::uint32_t target, int row, int groups, int subtile0, int x,
                                   std::uint32_t rank, const Issue& issue) {
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    if (kCluster > 1 && group % kCluster != static_cast<int>(rank)) continue;
    const std::uint32_t address = target + group * Layout::kSlabBytes;
    if (!map.by_column) {
      issue(map.group, address, 0, row + group * 8, subtile0, x);
      continue;
    }
#pragma unroll 1
    for (int s = 0; s < Layout::kSubtiles; ++s) {
      issue(map.group, address + s * Layout::kAtomBytes, (subtile0 + s) * Layout::kSubtileCols, row + group * 8, 0, x);
    }
  }
}

// One stage: keys [key0, key0 + kRows) and the columns of Layout from subtile `subtile0` on. All lanes of a warp call
// it; in a cluster each block loads its share of the boxes into all blocks. `places`: this lane's, of which the stage
// begins at box `first_box`. Taken from the lanes a few at a time: shuffles one by one cost 200 ns a box.
// PERF(H200, head_dim 512: one warp issues a stage every 250 ns. Divisions and unneeded boxes took 430): a whole stage
// that is not paged is one box a block of the cluster, and everything about it a constant.
template <class Layout, int kRows, int kCluster>
BROADHEAD_DEVICE void load_stage(const KvMap& map, const KvCoordinates& at, bool paged, BoxPlace places, int first_box,
                                 int key0, int subtile0, std::uint32_t target, Barrier& full, std::uint32_t rank) {
  const bool leader = threadIdx.x % 32 == 0;
  const auto issue = [&](const CUtensorMap& tensor_map, std::uint32_t address, int column, int row, int subtile,
                         int x) {
    if constexpr (kCluster == 1) {
      tma_load(&tensor_map, address, full, column, row, subtile, 0, x);
    } else {
      tma_load_multicast(&tensor_map, address, full, (1 << kCluster) - 1, column, row, subtile, 0, x);
    }
  };
  if (!paged) {
    if (!leader) return;
    const int row0 = at.row0 + key0;
    if (row0 + kRows <= map.rows && !map.by_column) {
      constexpr int kBoxRows = kRows / kCluster;
      barrier_expect(full, kRows / 8 * Layout::kSlabBytes);
      issue(map.box, target + rank * (kBoxRows / 8 * Layout::kSlabBytes), 0, row0 + static_cast<int>(rank) * kBoxRows,
            subtile0, at.x);
    } else {
      const int groups = max_int(0, min_int(kRows, map.rows - row0) + 7) / 8;
      barrier_expect(full, groups * Layout::kSlabBytes);
      issue_groups<Layout, kCluster>(map, target, row0, groups, subtile0, at.x, rank, issue);
    }
    return;
  }
  const int boxes = map.boxes;
  const int box_bytes = map.box_rows * (Layout::kSlabBytes / 8);
  const int own_x = places.page < 0 ? -1 : at.x + places.page * map.batch_step;
  const unsigned live = (__ballot_sync(0xffffffffu, own_x >= 0) >> first_box) & ((1ull << boxes) - 1);
  if (leader) barrier_expect(full, __popc(live) * box_bytes);
  const bool shared = kCluster > 1 && !map.by_column;  // the blocks of a cluster load every other box
  const int begin = shared ? static_cast<int>(rank) : 0;
  const int step = shared ? kCluster : 1;
  constexpr int kBatch = 4;
#pragma unroll 1
  for (int first = begin; first < boxes; first += kBatch * step) {
    int x[kBatch], slot[kBatch];
    BROADHEAD_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      x[i] = __shfl_sync(0xffffffffu, own_x, (first_box + first + i * step) % 32);
      slot[i] = __shfl_sync(0xffffffffu, places.slot, (first_box + first + i * step) % 32);
    }
    if (!leader) continue;
    BROADHEAD_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int box = first + i * step;
      if (box >= boxes || x[i] < 0) continue;
      const std::uint32_t address = target + box * box_bytes;
      if (map.by_column) {
        issue_groups<Layout, kCluster>(map, address, slot[i], map.box_rows / 8, subtile0, x[i], rank, issue);
      } else {
        issue(map.box, address, 0, slot[i], subtile0, x[i]);
      }
    }
  }
}

// Gathering: a block's 8-row groups are dealt to kWarps warps in turn. Lane l holds the pages of row l % 8 of its
// warp's groups l / 8, l / 8 + 4, ..., so that one read of the page table serves K and V.
template <int kRows, int kWarps>
struct GatheredRows {
  static constexpr int kGroups = (kRows / 8 + kWarps - 1) / kWarps;  // of a warp
  static constexpr int kReads = (kGroups + 3) / 4;
  int pages[kReads];  // -1: not live
  int first_row;      // of the block, in the sequence's pages

  // This lane's row of read `i` in the block.
  BROADHEAD_DEVICE static int row(int i, int warp) {
    const int lane = threadIdx.x % 32;
    return ((lane / 8 + i * 4) * kWarps + warp) * 8 + lane % 8;
  }

  template <class Element>
  BROADHEAD_DEVICE void read(const KvSource<Element>& source, int key0, int page_size, int warp) {
    first_row = source.leftpad + key0;
    BROADHEAD_UNROLL
    for (int i = 0; i < kReads; ++i) {
      const bool live = row(i, warp) < kRows && source.is_live(key0 + row(i, warp));
      pages[i] = live ? source.table[(first_row + row(i, warp)) / page_size] : -1;
    }
  }
};

// Copies rows of Layout's columns from column `col0` on: the groups [first_group, first_group + groups) of `rows` into
// a stage. Lane l copies every fourth 16-byte part, from part l % 4 on, of row l / 4 of a group: the row's address
// comes from its lane once, the parts differ by constants.
template <class Layout, class Element, int kRows, int kWarps>
BROADHEAD_DEVICE void gather_stage(const GatheredRows<kRows, kWarps>& rows, const Element* base, TensorStrides strides,
                                   int page_size, int first_group, int groups, int col0, int columns,
                                   std::uint32_t target, Barrier& full, int warp) {
  constexpr int kParts = Layout::kBytes / 16;
  constexpr int kPartsPerSubtile = Layout::kRowBytes / 16;
  constexpr int kPartCols = 16 / static_cast<int>(sizeof(Element));
  static_assert(kParts % 4 == 0 && kPartsPerSubtile % 4 == 0);
  const int lane = threadIdx.x % 32;
  const int row = lane / 4;
  const int swizzle = Layout::kRowBytes == 128 ? row : row / 2 % 4;
  const std::uint32_t lane_target = target + row * Layout::kRowBytes + ((lane % 4 ^ swizzle) * 16);
  const bool all_columns = columns - col0 >= Layout::kBytes / static_cast<int>(sizeof(Element));
  BROADHEAD_UNROLL
  for (int read = 0; read < GatheredRows<kRows, kWarps>::kReads; ++read) {
    const int page = rows.pages[read];
    const int slot = (rows.first_row + rows.row(read, warp)) % page_size;
    const long long own = page < 0 ? -1 : page * strides.batch + slot * strides.row;
#pragma unroll 1
    for (int g = 0; g < 4; ++g) {
      const int group = (read * 4 + g) * kWarps + warp - first_group;
      const long long offset = __shfl_sync(0xffffffffu, own, g * 8 + row);
      if (group < 0 || group >= groups) continue;
      const Element* source = base + (offset < 0 ? 0 : offset + col0 + lane % 4 * kPartCols);
      const std::uint32_t to = lane_target + group * Layout::kSlabBytes;
      // The parts of a subtile of eight: the upper four differ from the lower in one bit.
      const auto copy = [&](int i, bool live) {
        cp_async_16((to ^ (i * 4 % kPartsPerSubtile * 16)) + i * 4 / kPartsPerSubtile * Layout::kAtomBytes,
                    source + i * 4 * kPartCols, live);
      };
      if (all_columns) {
        BROADHEAD_UNROLL
        for (int i = 0; i < kParts / 4; ++i) copy(i, offset >= 0);
      } else {
#pragma unroll 1
        for (int i = 0; i < kParts / 4; ++i) {
          copy(i, offset >= 0 && col0 + (i * 4 + lane % 4) * kPartCols < columns);
        }
      }
    }
  }
  barrier_arrive_cp_async(full);
}

// The tile's rows of q or qv (`map`), subtile by subtile.
template <class Layout, int kTileM, class Element>
BROADHEAD_DEVICE void load_q_columns(const QMap& map, const KernelArgs& args, const TileState<Element>& state,
                                     std::uint32_t target, Barrier& full, int subtile0, int subtiles) {
  const int x = state.output.head * map.head_step + state.seqlen.batch_q * map.batch_step;
  const RowMap& rows = state.output.rows;
  const int token = rows.token(0);
  const int head = rows.first_row - token * rows.rows_per_token;  // of the token
  const int row_q = static_cast<int>(state.seqlen.row_q) + token;
  barrier_expect(full, subtiles * args.plan.rows_per_tile * Layout::kRowBytes);
  for (int s = 0; s < subtiles; ++s) {
    tma_load(&map.map, target + s * kTileM * Layout::kRowBytes, full, (subtile0 + s) * Layout::kSubtileCols, head,
             row_q, 0, x);
  }
}

template <class Layout, int kTileM, class Element>
BROADHEAD_DEVICE void load_q(const KernelArgs& args, const TileState<Element>& state, std::uint32_t target,
                             Barrier& full) {
  load_q_columns<Layout, kTileM>(args.maps.q, args, state, target, full, 0, Layout::kSubtiles);
}

}  // namespace broadhead::sm90
