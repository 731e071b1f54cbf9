// Gathers stages of K and V row by row with cp.async, where no tensor map fits.
#pragma once

#include "common/seqlen_info.h"
#include "common/tile_state.h"
#include "tma/copy.h"

namespace broadhead::tma {

// Gathering: an n_block's 8-row groups are dealt to kWarps warps in turn. Lane l holds row l % 8 of its warp's groups
// l / 8, l / 8 + 4, ..., so that one read of the page table serves K and V.
template <int kRows, int kWarps>
struct GatheredRows {
  static constexpr int kGroups = (kRows / 8 + kWarps - 1) / kWarps;  // of a warp
  static constexpr int kReads = (kGroups + 3) / 4;
  static constexpr long long kDead = -1;  // nobody sees the key
  // It lies on a page that the pool does not have. A bit that is 0 in every offset of a row: rows begin at multiples of
  // 16 bytes.
  static constexpr long long kMissing = 1;
  int page[kReads];
  int slot[kReads];  // -1: dead

  template <class Element>
  BROADHEAD_DEVICE void read(const KvSource<Element>& source, int key0, int page_size, int warp) {
    const int lane = threadIdx.x % 32;
    BROADHEAD_UNROLL
    for (int i = 0; i < kReads; ++i) {
      const int row = ((lane / 8 + i * 4) * kWarps + warp) * 8 + lane % 8;  // of the n_block
      const unsigned at = source.leftpad + key0 + row;
      const unsigned entry = at / static_cast<unsigned>(page_size);
      const bool live = row < kRows && source.live.contains(key0 + row);
      page[i] = live ? source.table[entry] : 0;
      slot[i] = live ? static_cast<int>(at - entry * page_size) : -1;
    }
  }

  // Where the lane's row of read `i` begins, kDead or kMissing.
  BROADHEAD_DEVICE long long offset(const AttnParams& params, const TensorStrides& strides, int i) const {
    if (slot[i] < 0) return kDead;
    return page_exists(params, page[i]) ? page[i] * strides.batch + slot[i] * strides.row : kMissing;
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

  // Whether the warp must note its rows in `missing`, the MissingKeys of the stage, where they are share `share`.
  template <class Missing>
  BROADHEAD_DEVICE bool changes(const AttnParams& params, const Missing& missing, int share) const {
    return missing.changes(any_missing(params), share);
  }
  // Notes them. Row 0 belongs to unit `first_unit` of the stage.
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
// TMA; columns past the end become zeros, since those of K are multiplied by zeros of Q, and so do missing rows.
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
      const bool exists = (offset[g] & Rows::kMissing) == 0;
      const Element* source = lane_base + (offset[g] & ~Rows::kMissing);
      const std::uint32_t to = lane_target + group * Layout::kSlabStride;
      BROADHEAD_UNROLL
      for (int i = 0; i < kParts; i += 4) {
        // The parts of a subtile of eight: the upper four differ from the lower in one bit.
        cp_async_16((to ^ (i % kPartsPerSubtile * 16)) + i / kPartsPerSubtile * Layout::kSubtileStride,
                    source + i * kPartCols, exists && i < parts);
      }
    }
  }
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<const std::uint64_t*>(&full));
}

}  // namespace broadhead::tma
