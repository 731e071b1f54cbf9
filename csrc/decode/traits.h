// Compile-time shape of one decode kernel, derived from a row of python/broadhead/support.py.
//
// A CTA has kWarps warps. The n_blocks of a tile are divided among kKeyGroups groups of warps, and the columns of
// head_dim among the kColGroups warps of a group. Each warp has its own ring of stages in shared memory: it copies,
// waits for and multiplies its own slices (kTileN keys x kCols columns of K or V). It meets the other warps only to sum
// the scores (kColGroups > 1) and at the end of a tile.
//
// Absorbed MLA (AbsorbedTraits): S = q K^T + qv V^T. A slice holds a warp's columns of both, and serves S and O.
#pragma once

#include "common/kv_source.h"
#include "common/math.h"
#include "common/rows.h"
#include "common/score.h"
#include "decode/work_queue.h"
#include "decode/workspace.h"

namespace broadhead::decode {

// Where the K and V of an item lie: KvSource without the fields that a decode warp has at hand. Every warp keeps its
// own, and the longer type would move what lies behind it in shared memory.
template <class KvElement>
struct CopySource {
  const KvElement* k;         // the head's first key, or its first page
  const KvElement* v;         // likewise
  const std::int32_t* table;  // the sequence's row of the page table; null: not paged
  int leftpad;                // paged: logical row of key 0
  PlacedKeys live;            // Loader::contains knows of ranges and trees
};

// What the products and the output of an item need. All warps share one.
struct DecodeTile {
  RowMap rows;
  AttentionMask mask;
  KeyInterval unmasked;  // keys that every row sees
  ScoreScale scale;
};

// Where a query row's result goes. The pointers are null for a dead row.
struct DecodeRow {
  void* out;
  float* lse;  // null: not wanted
  int head;    // the query head; -1: the row is dead
};

// What a tile costs besides its n_blocks (its Q, the wait for the slowest warp, the merge, the output), as the bytes
// that a multiprocessor would copy in that time. PERF(H200, 300 sequences of 500 tokens, 32/8 heads of 128, us: 64 KB
// 282, 128 KB 235, 256 KB 199, 384 KB 189, 512 KB 191)
constexpr int kTileCostBytes = 320 * 1024;

// With qv, kHeadDimWithQv_ is the columns of q and K, and kHeadDim_ those of qv and V. Without, kHeadDimWithQv_ is 0.
template <class KvElement_, int kHeadDim_, int kTileM_, int kTileN_, int kWarps_, int kKeyGroups_, int kStages_,
          int kMinBlocks_, int kSmemLimit_, int kHeadDimWithQv_ = 0>
struct DecodeTraits {
  using KvElement = KvElement_;  // the type of K and V in memory
  static constexpr bool k8Bit = sizeof(KvElement) == 1;
  // The type that the products take. e4m3 becomes fp16 in one instruction; Q, which may be bf16, is scaled into the
  // range of fp16.
  using Element = std::conditional_t<k8Bit, cutlass::half_t, KvElement>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWithQv = kHeadDimWithQv_ > 0;
  static constexpr int kHeadDimK = kWithQv ? kHeadDimWithQv_ : kHeadDim;
  static constexpr int kQCols = kWithQv ? kHeadDim + kHeadDimK : kHeadDim;  // columns of the tile of Q: qv's, then q's
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kKeyGroups = kKeyGroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kSmemLimit = kSmemLimit_;

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColGroups = kWarps / kKeyGroups;
  static constexpr int kCols = kHeadDim / kColGroups;

  // With qv the two warps of a multiprocessor's partition (every fourth) belong to different key groups, so that they
  // do not wait for the same barriers. PERF(H200, the same without qv, 16 x 8k, 32/4 heads of 512: 4250 -> 4140 GB/s)
  static constexpr bool kColGroupsFirst = kWithQv && kWarps > 4;
  BROADHEAD_DEVICE static constexpr int key_group(int warp) {
    return kColGroupsFirst ? warp / kColGroups : warp % kKeyGroups;
  }
  BROADHEAD_DEVICE static constexpr int col_group(int warp) {
    return kColGroupsFirst ? warp % kColGroups : warp / kKeyGroups;
  }
  BROADHEAD_DEVICE static constexpr int warp_of(int key_group, int col_group) {
    return kColGroupsFirst ? key_group * kColGroups + col_group : col_group * kKeyGroups + key_group;
  }

  // A stage of the ring has kTileN rows of kSliceBytes, in subtiles of at most 128 bytes a row (see slice_offset). With
  // qv these are rows of V, and kTileN rows of kBesideBytes follow, which hold the warp's columns of K.
  static constexpr int kSliceBytes = kCols * static_cast<int>(sizeof(KvElement));
  static constexpr int kSubtileBytes = kSliceBytes < 128 ? kSliceBytes : 128;
  static constexpr int kBesideCols = kWithQv ? kHeadDimK / kColGroups : 0;
  static constexpr int kBesideBytes = kBesideCols * static_cast<int>(sizeof(KvElement));
  static constexpr int kStageBytes = kTileN * (kSliceBytes + kBesideBytes);
  static constexpr int kStagesPerNBlock = kWithQv ? 1 : 2;  // without qv a stage of K, then one of V
  static constexpr int kNBlocksAhead = (kStages - 1) / kStagesPerNBlock;

  static constexpr int kMmaM = kTileM / 16;
  static constexpr int kMmaN = kTileN / 8;
  static constexpr int kSteps = kCols / 16;              // mma steps of S = Q K^T, with qv those of qv V^T
  static constexpr int kBesideSteps = kBesideCols / 16;  // with qv, mma steps of q K^T
  static constexpr int kOTiles = kCols / 8;
  // Fragments of Q stay in registers when O leaves room for them.
  static constexpr bool kQInRegisters = kMmaM == 1;

  static constexpr int kOtherBytes = kWarps * 384 + kTileM * (24 + kKeyGroups * 8) + 512;  // an upper bound
  static constexpr int kRoom = kSmemLimit - kWarps * kStages * kStageBytes - kOtherBytes;  // bytes beside the ring

  // With two buffers the warps of a key group meet once for each n_block, with one (where there is no room) twice.
  static constexpr int kScoreFloats = kColGroups > 1 ? kMmaM * kMmaN * 4 * 32 : 1;  // a warp's partial S
  static constexpr bool kTwoFit = kTileM * kQCols * 2 + 2 * kWarps * kScoreFloats * 4 <= kRoom;
  static constexpr int kScoreBuffers = kColGroups > 1 && kTwoFit ? 2 : 1;

  // Columns of O that the warps exchange at a time at a tile's end, as many as there is room for; a row is 8 words
  // longer, so that the float2 stores of four rows fall into different banks.
  static constexpr int merge_bytes(int cols) { return kWarps * kTileM * (cols + 8) * 4; }
  static constexpr int kMergeCols = merge_bytes(64) <= kRoom ? 64 : merge_bytes(32) <= kRoom ? 32 : 16;
  static constexpr int kMergePitch = kMergeCols + 8;

  // What a tile costs besides its n_blocks, in n_blocks.
  static constexpr int kNBlockBytes = kTileN * (kHeadDimK + kHeadDim) * static_cast<int>(sizeof(KvElement));
  static constexpr int kTileCost = ceil_div(kTileCostBytes / kMinBlocks, kNBlockBytes);

  static_assert(kWarps % kKeyGroups == 0 && (kCols == 64 || kCols == 128));
  static_assert(kTileM % 16 == 0 && (kTileN == 16 || kTileN == 32), "a lane speaks for a key");
  static_assert(!kWithQv || (!k8Bit && kBesideBytes == 32), "beside_offset knows two units a row");
  static_assert((kStages - 1) % kStagesPerNBlock == 0 && kNBlocksAhead >= 1, "a whole number of blocks is ahead");

  struct SharedStorage {
    alignas(128) char ring[kWarps][kStages][kStageBytes];
    union {
      struct {
        alignas(128) Element q[kTileM * kQCols];
        alignas(16) float scores[kScoreBuffers][kWarps][kScoreFloats];
      };
      float merge[kWarps][kTileM][kMergePitch];
    };
    float2 stats[kKeyGroups][kTileM];  // a row's maximum and sum over the keys of a group
    DecodeRow rows[kTileM];
    CopySource<KvElement> source[kWarps];     // what a warp copies from
    std::uint32_t missing[kWarps * kStages];  // beside a slice of K: a bit for each key that does not exist
    std::uint32_t some_missing;               // not 0 once any warp has met such a key
    WorkQueue queue[kWarps];
    DecodeTile tile;
    CtaSplits splits;
    unsigned q_largest[k8Bit ? kWarps : 1];  // 8-bit K and V: the largest number that each warp found in Q
    WorkSum sums[kWarps];                    // the work of the sequences that each warp read
  };
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tile does not fit the shared memory its row promises");
};

// The shape of rows with qv.
template <class Element, int kHeadDim, int kHeadDimV, int kTileM, int kTileN, int kWarps, int kKeyGroups, int kStages,
          int kMinBlocks, int kSmemLimit>
using AbsorbedTraits =
    DecodeTraits<Element, kHeadDimV, kTileM, kTileN, kWarps, kKeyGroups, kStages, kMinBlocks, kSmemLimit, kHeadDim>;

// Makes the compiler keep a value in a register instead of computing it again where it is used.
BROADHEAD_DEVICE std::uint32_t kept(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Byte offset of 16-byte unit `unit` of row `row` in a stage; swizzled so that eight rows of one unit, which an
// ldmatrix reads, and the units of a row, which cp.async writes, fall into different banks.
template <class Traits>
BROADHEAD_DEVICE int slice_offset(int row, int unit) {
  constexpr int kUnits = Traits::kSubtileBytes / 16;
  const int swizzle = kUnits == 8 ? row & 7 : (row >> 1) & 3;
  return unit / kUnits * (Traits::kTileN * Traits::kSubtileBytes) + row * Traits::kSubtileBytes +
         ((unit % kUnits) ^ swizzle) * 16;
}

// slice_offset(row + rows, unit + units) from `offset`, which is slice_offset(row, unit), by an XOR and an immediate.
// `rows` is a multiple of the powers of two above row; `units` is even and unit is 0 or 1, or `units` is 0.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t slice_step(std::uint32_t offset, int rows, int units) {
  constexpr int kUnits = Traits::kSubtileBytes / 16;
  const int swizzle = (units % kUnits) ^ (kUnits == 8 ? rows & 7 : (rows >> 1) & 3);
  return (offset ^ (swizzle * 16)) + units / kUnits * (Traits::kTileN * Traits::kSubtileBytes) +
         rows * Traits::kSubtileBytes;
}

// The byte offset in a stage of a unit of the rows of K beside a slice of V: two units a row, four rows in 128 bytes.
template <class Traits>
BROADHEAD_DEVICE int beside_offset(int row, int unit) {
  return Traits::kTileN * Traits::kSliceBytes + row * Traits::kBesideBytes + (unit ^ ((row >> 2) & 1)) * 16;
}

}  // namespace broadhead::decode
