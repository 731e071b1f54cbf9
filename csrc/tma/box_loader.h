// Loads stages of K and V by TMA boxes, of paged and of other sequences.
#pragma once

#include "common/math.h"
#include "common/seqlen_info.h"
#include "common/tile_state.h"
#include "tma/copy.h"
#include "tma/tensor_maps.h"

namespace broadhead::tma {

// What a producer needs of a tile, in the coordinates of a map.
struct KvCoordinates {
  int row0;  // of key 0
  int x;     // of the head, and of the sequence unless paged
};

template <class Element>
BROADHEAD_DEVICE KvCoordinates kv_coordinates(const KvMap& map, const AttnParams& params,
                                              const TileState<Element>& state) {
  const int head = kv_head_of(params, state.output.head);
  if (params.page_table != nullptr) return {0, head * map.head_step};
  return {static_cast<int>(state.seqlen.row_k), head * map.head_step + state.seqlen.batch_k * map.batch_step};
}

// What lane u reads from the page table for its box of an n_block.
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

// Lane u's share of the `keys` keys from `key0` on. Entries of boxes that no query sees are never read, since they may
// be garbage, but for those between the ranges of neighbouring queries: a page that exists is read then, and its keys
// are hidden.
template <class Element>
BROADHEAD_DEVICE BoxPlace box_place(const KvSource<Element>& source, int key0, int keys, int box_rows, int page_size) {
  const int offset = static_cast<int>(threadIdx.x % 32) * box_rows;
  const int key = key0 + offset;
  if (offset >= keys || !source.live.any(key, box_rows)) return {0, -1};
  const int entry = static_cast<unsigned>(key) / static_cast<unsigned>(page_size);
  return {source.table[entry], key - entry * page_size};
}

// Keys as boxes of a map, for a warp all of whose lanes call everything: lane u has box u of an n_block of kBlockKeys
// keys and issues it itself. An n_block is filled in stages of kStageKeys keys and the columns of Layout; in a cluster
// each of its CTAs loads every other box into all of them. PERF(H200, head_dim 512, page 64: 418 TFLOP/s, not paged
// 640, when one lane took the boxes from the others by shuffles behind the wait for each stage): nothing is left to
// work out behind a wait, where every instruction counts. The compiler loops over the lanes that have a box, 8
// instructions each.
template <class Layout, int kBlockKeys, int kStageKeys, int kCluster, ColumnTail kTail>
class BoxLoader {
  static_assert(kBlockKeys <= 32 * 8, "a lane has one box");
  static_assert(Layout::kBySubtile == (kTail == ColumnTail::kSubtiles));
  static constexpr bool kAllColumns = kStageKeys < kBlockKeys;  // in each stage, which the n_block fills with some keys

  const KvMap& map_;
  const KvCoordinates at_;
  const bool paged_;
  const bool fills_;  // with zeros what lies behind the end of the rows
  // The lane's box:
  const int stage_;             // of the n_block
  const std::uint32_t offset_;  // in the stage
  const bool own_;              // not another CTA's of the cluster
  int x_;
  int row_;
  int groups_;    // of 8 rows; 0: nobody needs it, or it lies past the end of the rows
  bool crosses_;  // the end of the rows
  // The stage that comes next:
  std::uint32_t bytes_;  // from all CTAs of the cluster
  int pieces_;           // in which the lane issues its box: 0: not at all; 1; 2: group by group or by subtiles

  BROADHEAD_DEVICE static int lane() { return threadIdx.x % 32; }

  BROADHEAD_DEVICE static void issue(const CUtensorMap& map, std::uint32_t target, Barrier& full, int column, int row,
                                     int subtile, int x) {
    if constexpr (kCluster == 1) {
      tma_load(&map, target, full, column, row, subtile, 0, x);
    } else {
      tma_load_multicast(&map, target, full, (1 << kCluster) - 1, column, row, subtile, 0, x);
    }
  }

  // Whether K or V ends within a subtile of columns, and stages are not laid out for it.
  BROADHEAD_DEVICE bool has_tail() const { return kTail == ColumnTail::kGroups && map_.whole_subtiles > 0; }

  // A box that crosses the end of the rows, or with a tail of columns.
  BROADHEAD_DEVICE void issue_groups(std::uint32_t target, Barrier& full, int subtile0) const {
    const bool tail = has_tail();
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

  // A box that issue_groups may have to cut: in a stage of whole subtiles it need not be cut for the tail.
  BROADHEAD_DEVICE void issue_pieces(std::uint32_t target, Barrier& full, int subtile0) const {
    const bool whole = has_tail() && !kAllColumns && !crosses_ && subtile0 + Layout::kSubtiles <= map_.whole_subtiles;
    if (whole) {
      issue(map_.box, target, full, 0, row_, subtile0, x_);
    } else {
      issue_groups(target, full, subtile0);
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
  BROADHEAD_DEVICE BoxLoader(const KvMap& map, const KvCoordinates& at, bool paged, std::uint32_t rank,
                             bool fills = false)
      : map_(map),
        at_(at),
        paged_(paged),
        fills_(fills),
        stage_(kStageKeys == kBlockKeys ? 0 : lane() / map.boxes),
        offset_((lane() - stage_ * map.boxes) * map.box_rows * (Layout::kSlabStride / 8)),
        own_(lane() % kCluster == static_cast<int>(rank)) {}

  // Goes to the n_block from `key0` on. `place`: read an n_block ahead.
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
      if ((Layout::kBySubtile || fills_) && groups_ > 0) groups_ = rows / 8;
      crosses_ = left < rows;
    }
  }

  // Whether existing_place has moved the lane's box.
  BROADHEAD_DEVICE bool is_missing(const AttnParams& params) const { return paged_ && row_ == params.page_size; }

  // To be called before the wait for a stage of the n_block, once for those that differ only in columns.
  BROADHEAD_DEVICE void prepare(int stage) {
    const int groups = stage_ == stage ? groups_ : 0;
    bytes_ = __reduce_add_sync(0xffffffffu, groups) * Layout::kSlabBytes;
    pieces_ = !own_ || groups == 0 ? 0 : crosses_ || has_tail() || Layout::kBySubtile ? 2 : 1;
  }

  // Behind the wait: the stage's columns from subtile `subtile0` on.
  BROADHEAD_DEVICE void load(int subtile0, std::uint32_t target, Barrier& full) const {
    if (lane() == 0) full.arrive_and_expect_tx(bytes_);
    if constexpr (Layout::kBySubtile) {
      if (pieces_ != 0) issue_subtiles(target + offset_, full);
    } else {
      if (pieces_ == 1) issue(map_.box, target + offset_, full, 0, row_, subtile0, x_);
      if (pieces_ == 2) issue_pieces(target + offset_, full, subtile0);
    }
  }
};

}  // namespace broadhead::tma
