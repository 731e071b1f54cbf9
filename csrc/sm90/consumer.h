// What consumer warpgroups of all Hopper kernels share: finishing scores and clearing dead rows of V.
//
// A warpgroup owns 64 rows; lane layout of its accumulators as in OnlineSoftmax with one 16-row tile a warp.
#pragma once

#include <cutlass/arch/barrier.h>

#include "common/online_softmax.h"
#include "common/plain_call.h"
#include "common/row_result.h"
#include "common/score.h"

namespace broadhead::sm90 {

using cutlass::arch::NamedBarrier;  // its static functions: with objects nvcc (13.0) makes other code

// Named barrier ids; 0 is __syncthreads.
constexpr int kPingPongBarrier = 1;  // + warpgroup: its 128 threads wait, the 128 of the warpgroup before it arrive
constexpr int kClearBarrier = 5;     // the warps that clear a stage of V together; + half of O in the wide kernel

// The type says that an id is the hardware's. CUTLASS adds 8 to plain numbers, and keeps the first 8 to itself.
BROADHEAD_DEVICE cutlass::arch::ReservedNamedBarriers hardware_id(int id) {
  return static_cast<cutlass::arch::ReservedNamedBarriers>(id);
}

// What the mainloop asks of a tile for every n_block, in registers.
struct BlockKinds {
  int plain_begin;  // n_blocks whose scores need neither a transformation nor a mask and whose keys are all live
  int plain_end;
  float scale_log2;

  template <class Element>
  BROADHEAD_DEVICE BlockKinds(const TileState<Element>& state, int keys, bool plain_call = false)
      : scale_log2(state.scale.scale_log2) {
    const int begin = ceil_div(state.unmasked.begin, keys), end = state.unmasked.end / keys;
    plain_begin = plain_call ? begin : state.gap.count(begin);
    plain_end = plain_call ? end : state.scale.transform ? 0 : state.gap.count(end);
  }

  BROADHEAD_DEVICE bool plain(int block) const { return block >= plain_begin && block < plain_end; }
};

// Scale, softcap and mask of an n_block's raw scores. `warp_row`: the warp's first row in the tile.
// Traits::kMaskByWords: the kernel has no registers for another mask than that of apply_mask.
template <class Traits, int kKeyTiles, class Element>
BROADHEAD_DEVICE void finish_scores(float (&s)[1][kKeyTiles][4], const TileState<Element>& state, int key0,
                                    int warp_row) {
  if (!Traits::kPlainCall && state.scale.transform) transform_scores(s, state.scale);
  if (key0 >= state.unmasked.begin && key0 + 8 * kKeyTiles <= state.unmasked.end) return;
  const int lane = fresh_thread() % 32;
  if constexpr (!Traits::kPlainCall) {
    apply_mask(s, state.mask, state.unmasked, state.output.rows, warp_row, key0, lane);
  } else if constexpr (Traits::kMaskByWords) {
    apply_mask(s, plain_mask(state), state.unmasked, state.output.rows, warp_row, key0, lane);
  } else {
    apply_plain_mask(s, plain_mask(state), state.output.rows, warp_row, key0, lane);
  }
}

// Who clears what of a stage: warp `warp` of `warps`, 16-byte parts [first_part, first_part + parts) of a row.
struct ClearShare {
  int warp;
  int warps;
  int first_part;
  int parts;
};

// Clears a row of a stage, its lanes' 16 bytes side by side.
template <class Layout>
BROADHEAD_DEVICE void clear_row(char* stage, int row, const ClearShare& share) {
  constexpr int kPartsPerSubtile = Layout::kRowBytes / 16;
  char* target = stage + row / 8 * Layout::kSlabStride + row % 8 * Layout::kRowBytes;
  for (int i = fresh_thread() % 32; i < share.parts; i += 32) {
    const int part = share.first_part + i;
    *reinterpret_cast<uint4*>(target + part / kPartsPerSubtile * Layout::kSubtileStride +
                              part % kPartsPerSubtile * 16) = uint4{0, 0, 0, 0};
  }
}

// Clears the rows of a V stage that no query of the tile sees: P is 0 there, but 0 * NaN is not. The callers then fence
// and meet before any of them lets wgmma read the stage.
// PERF: it is the first and the last n_block of nearly every masked tile. A row a thread, its parts one after the
// other, would have 32 lanes in the same banks.
template <class Layout, bool kPlainCall = false, class Element>
BROADHEAD_DEVICE void clear_dead_rows(const KvSource<Element>& source, char* v, int key0, int keys,
                                      const ClearShare& share) {
  const LiveKeys& live = source.live;
  const bool given = !kPlainCall && live.given.begin < live.given.end;
  int begin = kPlainCall ? 0 : max_int(live.prefix_len - key0, 0), end = min_int(live.interval.begin - key0, keys);
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {  // one copy of the code for both, as it stands in the midst of the mainloop
#pragma unroll 1
    for (int row = begin + share.warp; row < end; row += share.warps) {
      if (__builtin_expect(given, 0) && live.contains(key0 + row)) continue;
      clear_row<Layout>(v, row, share);
    }
    begin = max_int(live.interval.end - key0, begin);
    end = keys;
  }
}

}  // namespace broadhead::sm90
