// The producer's copies: stages of K and V by TMA boxes or gathered by cp.async, and the tile of Q.
#pragma once

#include "sm90/forward_traits.h"

namespace broadhead::sm90 {

// Whether any of keys [key, key + rows) is seen by a query of the tile.
template <class Element>
BROADHEAD_DEVICE bool any_live(const KvSource<Element>& source, int key, int rows) {
  return (key < source.live.end && key + rows > source.live.begin) || key < source.prefix_len;
}

// Where lane u's box of a block of keys lies. page -1: nothing to load.
struct BoxPage {
  int page;
  int slot;  // of the box's first row in the page
};

// Lane u's share of the `keys` keys from `key0` on. Entries of boxes that no query sees are never read: they may be
// garbage.
template <class Element>
BROADHEAD_DEVICE BoxPage box_page(const KvSource<Element>& source, int key0, int keys, int box_rows, int page_size) {
  const int offset = static_cast<int>(threadIdx.x % 32) * box_rows;
  const int key = key0 + offset;
  if (offset >= keys || !any_live(source, key, box_rows)) return {-1, 0};
  const int entry = key / page_size;
  return {source.table[entry], key - entry * page_size};
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
// it; in a cluster each block loads its share of the boxes into all blocks. `pages`: this lane's, of which the stage
// begins at box `first_box`.
// PERF(H200, head_dim 512: one warp issues a stage every 250 ns. Divisions and unneeded boxes took 430): a whole stage
// that is not paged is one box a block of the cluster, and everything about it a constant.
template <class Layout, int kRows, int kCluster>
BROADHEAD_DEVICE void load_stage(const KvMap& map, const KvCoordinates& at, bool paged, BoxPage pages, int first_box,
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
  const unsigned live = (__ballot_sync(0xffffffffu, pages.page >= 0) >> first_box) & ((1ull << boxes) - 1);
  if (leader) barrier_expect(full, __popc(live) * box_bytes);
  const bool shared = kCluster > 1 && !map.by_column;  // the blocks of a cluster load every other box
#pragma unroll 1
  for (int box = shared ? static_cast<int>(rank) : 0; box < boxes; box += shared ? kCluster : 1) {
    const int page = __shfl_sync(0xffffffffu, pages.page, first_box + box);
    const int slot = __shfl_sync(0xffffffffu, pages.slot, first_box + box);
    if (page < 0 || !leader) continue;
    const std::uint32_t address = target + box * box_bytes;
    const int x = at.x + page * map.batch_step;
    if (map.by_column) {
      issue_groups<Layout, kCluster>(map, address, slot, map.box_rows / 8, subtile0, x, rank, issue);
    } else {
      issue(map.box, address, 0, slot, subtile0, x);
    }
  }
}

// Gathering: this warp's 8-row groups of a stage are warp, warp + kWarps, ... Lane l holds the pages of row l % 8 of
// its groups l / 8, l / 8 + 4, ..., so that one read of the page table serves K and V.
template <int kRows, int kWarps>
struct GatheredRows {
  static constexpr int kGroups = (kRows / 8 + kWarps - 1) / kWarps;
  static constexpr int kReads = (kGroups + 3) / 4;
  int pages[kReads];  // -1: not live

  template <class Element>
  BROADHEAD_DEVICE void read(const KvSource<Element>& source, int key0, int page_size, int warp) {
    const int lane = threadIdx.x % 32;
    BROADHEAD_UNROLL
    for (int i = 0; i < kReads; ++i) {
      const int row = ((lane / 8 + i * 4) * kWarps + warp) * 8 + lane % 8;
      const bool live = row < kRows && source.is_live(key0 + row);
      pages[i] = live ? source.table[(source.leftpad + key0 + row) / page_size] : -1;
    }
  }
};

// Columns [col0, col0 + columns of Layout) of the stage's rows; `base`, `row_stride`, `page_stride` in elements.
template <class Layout, class Element, int kRows, int kWarps>
BROADHEAD_DEVICE void gather_stage(const GatheredRows<kRows, kWarps>& rows, const Element* base, TensorStrides strides,
                                   int key0, int page_size, int col0, int columns, std::uint32_t target, Barrier& full,
                                   int warp) {
  constexpr int kUnits = Layout::kBytes / 16;  // of a row
  constexpr int kUnitsPerSubtile = Layout::kRowBytes / 16;
  const int lane = threadIdx.x % 32;
  BROADHEAD_UNROLL
  for (int read = 0; read < GatheredRows<kRows, kWarps>::kReads; ++read) {
#pragma unroll 1
    for (int g = 0; g < 4; ++g) {
      const int group = (read * 4 + g) * kWarps + warp;
      if (group >= kRows / 8) break;
#pragma unroll 1
      for (int first = 0; first < 8 * kUnits; first += 32) {
        const int unit = first + lane;
        const int row = unit / kUnits;
        const int part = unit % kUnits;
        const int page = __shfl_sync(0xffffffffu, rows.pages[read], (g * 8 + row) % 32);
        if (8 * kUnits % 32 != 0 && unit >= 8 * kUnits) continue;
        const int slot = (key0 + group * 8 + row) % page_size;
        const int column = col0 + part * (16 / static_cast<int>(sizeof(Element)));
        const bool live = page >= 0 && column < columns;
        const Element* source = live ? base + page * strides.batch + slot * strides.row + column : base;
        const int swizzled = Layout::kRowBytes == 128 ? (part % kUnitsPerSubtile) ^ (row & 7)
                                                      : (part % kUnitsPerSubtile) ^ ((row >> 1) & 3);
        cp_async_16(target + group * Layout::kSlabBytes + part / kUnitsPerSubtile * Layout::kAtomBytes +
                        row * Layout::kRowBytes + swizzled * 16,
                    source, live);
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
