// Transposition of 8-bit V in shared memory: from rows of keys to rows of columns, as wgmma wants its second operand.
//
// Within 16 keys the order is that in which a lane holds P: bytes 4 t .. 4 t + 3 are keys 2 t, 2 t + 1, 8 + 2 t and
// 8 + 2 t + 1, so that four neighbouring scores of lane t of a quad make one register of operand A (PTX ISA,
// "Register fragments for wgmma.mma_async.m64nNk32").
#pragma once

#include "sm90/consumer.h"
#include "sm90/forward_fp8/traits.h"
#include "sm90/stmatrix.h"
#include "tma/kernel_args.h"

namespace broadhead::sm90 {

using namespace tma;

// Ones in the bytes of this lane whose keys are live. `live`: a bit for each of 16 keys and more.
BROADHEAD_DEVICE std::uint32_t live_bytes(std::uint32_t live) {
  live >>= fresh_thread() % 4 * 2;
  std::uint32_t mask = 0;
  BROADHEAD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if ((live >> (i / 2 * 8 + i % 2)) & 1) mask |= 0xffu << (8 * i);
  }
  return mask;
}

// One stage of kKeys x columns of VLayout; each of the warps takes every other group of 32 columns.
template <class Traits>
struct Transposer {
  using Element = typename Traits::Element;
  using VLayout = typename Traits::VLayout;
  using Layout = typename Traits::TransposedLayout;
  static constexpr int kKeyGroups = Traits::kTileN / 16;

  std::uint32_t source_row;  // of this lane in a unit of 16 keys x 32 columns
  std::uint32_t target_row;  // at part 0; other parts by exclusive or
  std::uint32_t selector;    // of two registers' bytes for the first matrix that is stored; the second has the others

  BROADHEAD_DEVICE Transposer() {
    const int lane = threadIdx.x % 32;
    const int row = lane % 8;
    const int matrix = lane / 8;
    // Loaded: keys 0-7 and 8-15 of the first 16 columns, the same of the second.
    source_row = matrix % 2 * VLayout::kSlabStride + row * VLayout::kRowBytes;
    // A lane of row r holds columns 2 r and 2 r + 1. Stored: even columns from the first four rows and odd ones from
    // the others, then the reverse, so that the eight rows of a matrix lie in different banks.
    const int column = matrix / 2 * 16 + 2 * row + (row / 4 ^ matrix % 2);
    target_row = column / 8 * Layout::kSlabBytes + column % 8 * Layout::kRowBytes +
                 (Layout::kRowBytes == 128 ? column % 8 : column % 8 / 2) * 16;
    const bool upper = lane / 4 >= 4;
    selector = upper ? 0x7531 : 0x6420;
  }

  // What ldmatrix_x4_trans read of 16 keys, key group `group` of the stage, but for the bytes that `mask`
  // clears.
  BROADHEAD_DEVICE void store(std::uint32_t result, int group, const std::uint32_t (&x)[4], std::uint32_t mask) const {
    constexpr int kParts = Layout::kRowBytes / 16;
    const std::uint32_t y[4] = {
        __byte_perm(x[0], x[1], selector) & mask, __byte_perm(x[0], x[1], selector ^ 0x1111) & mask,
        __byte_perm(x[2], x[3], selector) & mask, __byte_perm(x[2], x[3], selector ^ 0x1111) & mask};
    stmatrix_x4((result + group / kParts * Layout::kAtomBytes) ^ (group % kParts * 16), y);
  }

  // Where this lane reads and writes `columns`, of key group 0.
  BROADHEAD_DEVICE std::uint32_t from(std::uint32_t v, int columns) const {
    constexpr int kParts = VLayout::kRowBytes / 16;
    const int lane = fresh_thread() % 32;
    const int part = columns / 16 + lane / 16;
    const int swizzle = VLayout::kRowBytes == 128 ? lane % 8 : lane % 8 / 2;
    return v + source_row + part / kParts * VLayout::kSubtileStride + ((part % kParts ^ swizzle) * 16);
  }
  BROADHEAD_DEVICE std::uint32_t to(std::uint32_t target, int columns) const {
    return target + target_row + columns / 8 * Layout::kSlabBytes;
  }

  BROADHEAD_DEVICE void run(std::uint32_t v, std::uint32_t target, int warp) const {
#pragma unroll 1
    for (int columns = warp * 32; columns < Traits::kHeadDimV; columns += Traits::kTransposeWarps * 32) {
      const std::uint32_t source = from(v, columns), result = to(target, columns);
      constexpr int kAhead = 3;  // loads in flight
      std::uint32_t x[kAhead + 1][4];
      BROADHEAD_UNROLL
      for (int group = 0; group < kAhead; ++group) {
        ldmatrix_x4_trans(x[group], source + group * 2 * VLayout::kSlabStride);
      }
      BROADHEAD_UNROLL
      for (int group = 0; group < kKeyGroups; ++group) {
        const int next = group + kAhead;
        if (next < kKeyGroups) ldmatrix_x4_trans(x[next % (kAhead + 1)], source + next * 2 * VLayout::kSlabStride);
        store(result, group, x[group % (kAhead + 1)], ~0u);
      }
    }
  }

  // Likewise, but for what no query sees. PERF: whether a key is live is asked once a key, not for each of its columns.
  BROADHEAD_DEVICE void run_masked(const KvSource<Element>& source, int key0, std::uint32_t v, std::uint32_t target,
                                   int warp) const {
    std::uint32_t live = 0;  // of 32 keys
#pragma unroll 1
    for (int group = 0; group < kKeyGroups; ++group) {
      live = group % 2 == 0 ? live_word(source.live, key0 + group * 16) : live >> 16;
      const std::uint32_t mask = live_bytes(live);
#pragma unroll 1
      for (int columns = warp * 32; columns < Traits::kHeadDimV; columns += Traits::kTransposeWarps * 32) {
        std::uint32_t x[4];
        ldmatrix_x4_trans(x, from(v, columns) + group * 2 * VLayout::kSlabStride);
        store(to(target, columns), group, x, mask);
      }
    }
  }
};

// Two warps: V of all tiles. P is 0 for keys that no query sees, but 0 * NaN is not: their bytes are cleared here.
template <class Traits>
BROADHEAD_DEVICE void transpose_tiles(const KernelArgs& args, typename Traits::SharedStorage& smem, int warp) {
  using Element = typename Traits::Element;
  const bool leader = threadIdx.x % 32 == 0;
  const Transposer<Traits> transposer;
  SlotState slot;
  RingState<2> ring;
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const TileSlot<Element>& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    const KvSource<Element>& source = tile.state.source;
    const BlockRange range = tile.state.range;
    for (int block = range.end - 1; block >= range.begin; --block) {
      const std::uint32_t stage = ring.stage();
      barrier_wait(smem.v_full[stage], ring.parity());
      barrier_wait(smem.transposed_empty[stage], ring.parity() ^ 1);
      const std::uint32_t v = smem_address(smem.v[stage]);
      const std::uint32_t target = smem_address(smem.transposed_v[stage]);
      const int key0 = first_key_of<Traits>(tile.state, block);
      if (all_live<Traits>(source.live, key0, Traits::kTileN)) {
        transposer.run(v, target, warp);
      } else {
        transposer.run_masked(source, key0, v, target, warp);
      }
      cutlass::arch::fence_view_async_shared();  // ordinary writes, read by wgmma
      __syncwarp();
      if (leader) {
        smem.transposed_full[stage].arrive();
        smem.v_empty[stage].arrive();
      }
      ring.advance();
    }
    __syncwarp();
    if (leader) smem.tile_empty[slot.stage()].arrive();
    slot.advance();
  }
}

}  // namespace broadhead::sm90
