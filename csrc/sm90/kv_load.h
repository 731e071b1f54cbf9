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

// What lane u reads from the page table for its box of a block.
struct BoxPlace {
  int page;
  int slot;  // of its first row in the page; -1: nobody needs the box
};

// A box of a page that the pool does not have moves to a row that no page has: TMA fills it with zeros. Behind the
// latency of box_place.
BROADHEAD_DEVICE BoxPlace existing_place(const AttnParams& params, BoxPlace place) {
  if (place.slot < 0) return {-1, 0};
  return page_exists(params, place.page) ? place : BoxPlace{0, params.page_size};
}

// Lane u's share of the `keys` keys from `key0` on. Entries of boxes that no query sees are never read: they may be
// garbage.
template <class Element>
BROADHEAD_DEVICE BoxPlace box_place(const KvSource<Element>& source, int key0, int keys, int box_rows, int page_size) {
  const int offset = static_cast<int>(threadIdx.x % 32) * box_rows;
  const int key = key0 + offset;
  if (offset >= keys || !any_live(source, key, box_rows)) return {0, -1};
  const int entry = static_cast<unsigned>(key) / static_cast<unsigned>(page_size);
  return {source.table[entry], key - entry * page_size};
}

// Keys as boxes of a map, for a warp all of whose lanes call everything: lane u has box u of a block of kBlockKeys keys
// and issues it itself. A block is filled in stages of kStageKeys keys and the columns of Layout; in a cluster each of
// its blocks loads every other box into all of them.
// PERF(H200, head_dim 512, page 64: 418 TFLOP/s, not paged 640, when one lane took the boxes from the others by
// shuffles behind the wait for each stage): nothing is left to work out behind a wait, where every instruction counts.
// The compiler loops over the lanes that have a box, 8 instructions each.
template <class Layout, int kBlockKeys, int kStageKeys, int kCluster, ColumnTail kTail>
class BoxLoader {
  static_assert(kBlockKeys <= 32 * 8, "a lane has one box");
  static_assert(Layout::kBySubtile == (kTail == ColumnTail::kSubtiles));
  static constexpr bool kAllColumns = kStageKeys < kBlockKeys;  // in each stage, which the block fills with some keys

  const KvMap& map_;
  const KvCoordinates at_;
  const bool paged_;
  // Of the lane's box:
  const int stage_;  // of the block
  const std::uint32_t offset_;  // in the stage
  const bool own_;  // not another block's of the cluster
  int x_;
  int row_;
  int groups_;  // of 8 rows; 0: nobody needs it, or it lies past the end of the rows
  bool crosses_;  // the end of the rows
  // Of the stage that comes next:
  std::uint32_t bytes_;  // from all blocks of the cluster
  int pieces_;  // in which the lane issues its box: 0: not at all; 1; 2: group by group or by subtiles

  BROADHEAD_DEVICE static int lane() { return threadIdx.x % 32; }

  BROADHEAD_DEVICE static void issue(const CUtensorMap& map, std::uint32_t target, Barrier& full, int column, int row,
                                     int subtile, int x) {
    if constexpr (kCluster == 1) {
      tma_load(&map, target, full, column, row, subtile, 0, x);
    } else {
      tma_load_multicast(&map, target, full, (1 << kCluster) - 1, column, row, subtile, 0, x);
    }
  }

  // A box that crosses the end of the rows, or with a tail of columns.
  BROADHEAD_DEVICE void issue_groups(std::uint32_t target, Barrier& full, int subtile0) const {
    const bool tail = kTail == ColumnTail::kGroups && map_.whole_subtiles > 0;
#pragma unroll 1
    for (int group = 0; group < groups_; ++group) {
      const std::uint32_t address = target + group * Layout::kSlabBytes;
      const int row = row_ + group * 8;
      if (!tail) {
        issue(map_.group, address, full, 0, row, subtile0, x_);
        continue;
      }
      int s = 0;
      if (kAllColumns) {
        issue(map_.box, address, full, 0, row, 0, x_);
        s = min_int(map_.whole_subtiles, Layout::kSubtiles);
      }
#pragma unroll 1
      for (; s < Layout::kSubtiles; ++s) {
        issue(map_.group, address + s * Layout::kAtomBytes, full, (subtile0 + s) * Layout::kSubtileCols, row, 0, x_);
      }
    }
  }

  // The whole box, whose rows past the end become zeros.
  BROADHEAD_DEVICE void issue_subtiles(std::uint32_t target, Barrier& full) const {
#pragma unroll 1
    for (int s = 0; s < Layout::kSubtiles; ++s) {
      issue(map_.box, target + s * Layout::kSubtileStride, full, s * Layout::kSubtileCols, row_, 0, x_);
    }
  }

 public:
  BROADHEAD_DEVICE BoxLoader(const KvMap& map, const KvCoordinates& at, bool paged, std::uint32_t rank)
      : map_(map),
        at_(at),
        paged_(paged),
        stage_(kStageKeys == kBlockKeys ? 0 : lane() / map.boxes),
        offset_((lane() - stage_ * map.boxes) * map.box_rows * (Layout::kSlabStride / 8)),
        own_(lane() % kCluster == static_cast<int>(rank)) {}

  // Goes to the block from `key0` on. `place`: read a block ahead.
  BROADHEAD_DEVICE void take(BoxPlace place, int key0) {
    const int rows = map_.box_rows;
    if (paged_) {
      x_ = at_.x + place.page * map_.batch_step;
      row_ = place.slot;
      groups_ = place.page < 0 ? 0 : rows / 8;
      crosses_ = false;
    } else {
      const int offset = lane() * rows;
      x_ = at_.x;
      row_ = at_.row0 + key0 + offset;
      const int left = map_.rows - row_;
      groups_ = offset < kBlockKeys ? (min_int(rows, max_int(0, left)) + 7) / 8 : 0;
      if (Layout::kBySubtile && groups_ > 0) groups_ = rows / 8;
      crosses_ = left < rows;
    }
  }

  // Whether existing_place has moved the lane's box.
  BROADHEAD_DEVICE bool is_missing(const AttnParams& params) const { return paged_ && row_ == params.page_size; }

  // To be called before the wait for a stage of the block, once for those that differ only in columns.
  BROADHEAD_DEVICE void prepare(int stage) {
    const int groups = stage_ == stage ? groups_ : 0;
    bytes_ = __reduce_add_sync(0xffffffffu, groups) * Layout::kSlabBytes;
    const bool tail = kTail == ColumnTail::kGroups && kAllColumns && map_.whole_subtiles > 0;
    pieces_ = !own_ || groups == 0 ? 0 : crosses_ || tail || Layout::kBySubtile ? 2 : 1;
  }

  // Behind the wait: the stage's columns from subtile `subtile0` on.
  BROADHEAD_DEVICE void load(int subtile0, std::uint32_t target, Barrier& full) const {
    if (lane() == 0) barrier_expect(full, bytes_);
    if constexpr (Layout::kBySubtile) {
      if (pieces_ != 0) issue_subtiles(target + offset_, full);
    } else {
      // Of stages that differ in columns the last ones may hold a tail.
      const bool tail = kTail == ColumnTail::kGroups && !kAllColumns && map_.whole_subtiles > 0 &&
                        subtile0 + Layout::kSubtiles > map_.whole_subtiles;
      if (pieces_ == 1 && !tail) issue(map_.box, target + offset_, full, 0, row_, subtile0, x_);
      if (pieces_ == 2 || (pieces_ == 1 && tail)) issue_groups(target + offset_, full, subtile0);
    }
  }
};

// Gathering: a block's 8-row groups are dealt to kWarps warps in turn. Lane l holds row l % 8 of its warp's groups
// l / 8, l / 8 + 4, ..., so that one read of the page table serves K and V.
template <int kRows, int kWarps>
struct GatheredRows {
  static constexpr int kGroups = (kRows / 8 + kWarps - 1) / kWarps;  // of a warp
  static constexpr int kReads = (kGroups + 3) / 4;
  static constexpr long long kDead = -1;  // nobody sees the key
  // It lies on a page that the pool does not have. A bit that is 0 in every offset of a row: rows begin at multiples of
  // 16 bytes.
  static constexpr long long kLost = 1;
  int page[kReads];
  int slot[kReads];  // -1: dead

  template <class Element>
  BROADHEAD_DEVICE void read(const KvSource<Element>& source, int key0, int page_size, int warp) {
    const int lane = threadIdx.x % 32;
    BROADHEAD_UNROLL
    for (int i = 0; i < kReads; ++i) {
      const int row = ((lane / 8 + i * 4) * kWarps + warp) * 8 + lane % 8;  // of the block
      const unsigned at = source.leftpad + key0 + row;
      const unsigned entry = at / static_cast<unsigned>(page_size);
      const bool live = row < kRows && source.is_live(key0 + row);
      page[i] = live ? source.table[entry] : 0;
      slot[i] = live ? static_cast<int>(at - entry * page_size) : -1;
    }
  }

  // Where the lane's row of read `i` begins, kDead or kLost.
  BROADHEAD_DEVICE long long offset(const AttnParams& params, const TensorStrides& strides, int i) const {
    if (slot[i] < 0) return kDead;
    return page_exists(params, page[i]) ? page[i] * strides.batch + slot[i] * strides.row : kLost;
  }

  BROADHEAD_DEVICE bool is_missing(const AttnParams& params, int i) const {
    return slot[i] >= 0 && !page_exists(params, page[i]);
  }
  BROADHEAD_DEVICE bool any_missing(const AttnParams& params) const {
    bool any = false;
    BROADHEAD_UNROLL
    for (int i = 0; i < kReads; ++i) any = any || is_missing(params, i);
    return any;
  }

  // MissingKeys of the warp's rows, `share`.
  template <class Missing>
  BROADHEAD_DEVICE bool changes(const AttnParams& params, const Missing& missing, int share) const {
    return missing.changes(any_missing(params), share);
  }
  // `first_unit`: that of row 0.
  template <class Missing>
  BROADHEAD_DEVICE void note(const AttnParams& params, Missing& missing, int first_unit, int warp, int share) const {
    const int lane = threadIdx.x % 32;
    BROADHEAD_UNROLL
    for (int i = 0; i < kReads; ++i) {
      const unsigned bits = __ballot_sync(0xffffffffu, is_missing(params, i));
      const int unit = (lane / 8 + i * 4) * kWarps + warp;
      if (lane % 8 == 0 && unit * 8 < kRows) missing.set_unit(first_unit + unit, bits >> lane);
    }
    missing.set_flag(__any_sync(0xffffffffu, any_missing(params)), share);
  }
};

// Copies rows of Layout's columns from column `col0` on: the groups [first_group, first_group + groups) of `rows` into
// a stage. Lane l copies every fourth 16-byte part, from part l % 4 on, of row l / 4 of a group: the row's address
// comes from its lane once, the parts differ by constants. Rows that are not live keep what the stage held, as with
// TMA; columns past the end become zeros, since those of K are multiplied by zeros of Q, and so do lost rows.
template <class Layout, class Element, int kRows, int kWarps>
BROADHEAD_DEVICE void gather_stage(const AttnParams& params, const GatheredRows<kRows, kWarps>& rows,
                                   const Element* base, const TensorStrides& strides, int first_group, int groups,
                                   int col0, int columns, std::uint32_t target, Barrier& full, int warp) {
  using Rows = GatheredRows<kRows, kWarps>;
  constexpr int kParts = Layout::kBytes / 16;
  constexpr int kPartsPerSubtile = Layout::kRowBytes / 16;
  constexpr int kPartCols = 16 / static_cast<int>(sizeof(Element));
  static_assert(kParts % 4 == 0 && kPartsPerSubtile % 4 == 0);
  const int lane = threadIdx.x % 32;
  const int row = lane / 4;
  const int swizzle = Layout::kRowBytes == 128 ? row : row / 2 % 4;
  const std::uint32_t lane_target = target + row * Layout::kRowBytes + ((lane % 4 ^ swizzle) * 16);
  const Element* lane_base = base + col0 + lane % 4 * kPartCols;
  const int parts = (columns - col0 + kPartCols - 1) / kPartCols - lane % 4;  // the lane's are 0, 4, 8, ... of them
  BROADHEAD_UNROLL
  for (int read = 0; read < Rows::kReads; ++read) {
    const long long own = rows.offset(params, strides, read);
    long long offset[4];
    BROADHEAD_UNROLL
    for (int g = 0; g < 4; ++g) offset[g] = __shfl_sync(0xffffffffu, own, g * 8 + row);
    BROADHEAD_UNROLL
    for (int g = 0; g < 4; ++g) {
      if ((read * 4 + g) * kWarps >= kRows / 8) break;
      const int group = (read * 4 + g) * kWarps + warp - first_group;
      if (group < 0 || group >= groups || offset[g] == Rows::kDead) continue;
      const bool exists = (offset[g] & Rows::kLost) == 0;
      const Element* source = lane_base + (offset[g] & ~Rows::kLost);
      const std::uint32_t to = lane_target + group * Layout::kSlabStride;
      BROADHEAD_UNROLL
      for (int i = 0; i < kParts; i += 4) {
        // The parts of a subtile of eight: the upper four differ from the lower in one bit.
        cp_async_16((to ^ (i % kPartsPerSubtile * 16)) + i / kPartsPerSubtile * Layout::kSubtileStride,
                    source + i * kPartCols, exists && i < parts);
      }
    }
  }
  barrier_arrive_cp_async(full);
}

// Where a tile's rows of q or qv lie in its map.
struct QCoordinates {
  int head;  // of the token
  int row;
  int x;
};

template <class Element>
BROADHEAD_DEVICE QCoordinates q_coordinates(const QMap& map, const TileState<Element>& state) {
  const RowMap& rows = state.output.rows;
  const int token = rows.token(0);
  return {rows.first_row - token * rows.rows_per_token, static_cast<int>(state.seqlen.row_q) + token,
          state.output.head * map.head_step + state.seqlen.batch_q * map.batch_step};
}

// Brings the tile into the L2: it comes from DRAM, and is asked for before its buffer is free. By one lane.
template <class Layout>
BROADHEAD_DEVICE void prefetch_q(const QMap& map, const QCoordinates& at) {
  for (int s = 0; s < Layout::kSubtiles; ++s)
    tma_prefetch(&map.map, s * Layout::kSubtileCols, at.head, at.row, 0, at.x);
}

// The tile's subtiles of columns [subtile0, subtile0 + subtiles), of `rows` rows.
template <class Layout, int kTileM>
BROADHEAD_DEVICE void load_q(const QMap& map, const QCoordinates& at, int rows, std::uint32_t target, Barrier& full,
                             int subtile0 = 0, int subtiles = Layout::kSubtiles) {
  barrier_expect(full, subtiles * rows * Layout::kRowBytes);
  for (int s = 0; s < subtiles; ++s) {
    tma_load(&map.map, target + s * kTileM * Layout::kRowBytes, full, (subtile0 + s) * Layout::kSubtileCols, at.head,
             at.row, 0, at.x);
  }
}

}  // namespace broadhead::sm90
