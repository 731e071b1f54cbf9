// Compile-time shape of one portable forward kernel, derived from a row of python/broadhead/support.py.
//
// Shared-memory tiles are made of subtiles of 64 columns: rows of 128 bytes whose eight 16-byte units are XORed with
// row % 8, which makes every ldmatrix and cp.async free of bank conflicts.
#pragma once

#include "common/math.h"
#include "common/tile_state.h"
#include "mma_sync/atoms.h"

namespace broadhead::sm80 {

template <class Element_, int kHeadDim_, int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_, int kStages_,
          int kKChunk_, int kVChunk_, int kVCols_, int kMinBlocks_, int kSmemLimit_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr bool kPlainCall = false;  // common/plain_call.h
  static constexpr bool kSplits = true;
  static constexpr bool kPages = true;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_;
  static constexpr int kKChunk = kKChunk_;
  static constexpr int kVChunk = kVChunk_;
  static constexpr int kVCols = kVCols_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kSmemLimit = kSmemLimit_;

  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kSubtileCols = 64;
  static constexpr int kRowBytes = 128;
  static constexpr int kQCols = round_up(kHeadDim, kSubtileCols);

  // One n_block takes kKChunks stages of K, then kVChunks stages of V.
  static constexpr int kKChunks = ceil_div(kHeadDim, kKChunk);
  static constexpr int kVKeyChunks = kTileN / kVChunk;
  static constexpr int kVColChunks = ceil_div(kHeadDim, kVCols);
  static constexpr int kVChunks = kVKeyChunks * kVColChunks;
  static constexpr int kChunks = kKChunks + kVChunks;
  static constexpr int kStageElems = max_int(kTileN * round_up(kKChunk, kSubtileCols), kVChunk* kVCols);

  // S = Q K^T: warp (m, n) owns kMmaM x 16 rows and kMmaN x 8 keys.
  static constexpr int kRowsPerWarp = kTileM / kWarpsM;
  static constexpr int kMmaM = kRowsPerWarp / 16;
  static constexpr int kKeysPerWarp = kTileN / kWarpsN;
  static constexpr int kMmaN = kKeysPerWarp / 8;

  // O: the columns of a V chunk are divided among the kWarpsN warps; kWarpsPerSubtile warps divide a subtile.
  static constexpr int kVSubtiles = kVCols / kSubtileCols;
  static constexpr int kWarpsPerSubtile = kVSubtiles % kWarpsN == 0 ? 1 : (kVSubtiles * 2) % kWarpsN == 0 ? 2 : 4;
  static constexpr int kParts = kVSubtiles * kWarpsPerSubtile / kWarpsN;  // parts of each V chunk that a warp owns
  static constexpr int kPartCols = kSubtileCols / kWarpsPerSubtile;
  static constexpr int kPartTiles = kPartCols / 16;  // ldmatrix.x4.trans steps in a part
  // 8-column accumulators; bucket 96 keeps V in stages of 128 columns but computes 96.
  static constexpr int kOTiles = kWarpsN == 1 ? kHeadDim / 8 : kVColChunks * kParts * kPartTiles * 2;

  // P stays in registers when a warp owns whole rows of S, else it is exchanged through shared memory.
  static constexpr bool kSharedP = kWarpsN > 1;
  static constexpr int kPCols = round_up(kTileN, kSubtileCols);
  // Q fragments are kept in registers when S, O and they leave room for the rest (255 registers a thread).
  static constexpr int kQRegisters = kMmaM * (kHeadDim / 16) * 4;
  static constexpr bool kQInRegisters =
      !kSharedP && kKChunks == 1 && kQRegisters <= 32 && kQRegisters + kMmaM * (kMmaN + kOTiles) * 4 <= 160;

  // Four registers for walking pointers are worth it where a CTA has little other work to hide address arithmetic.
  static constexpr bool kWalkingPointers = !kSharedP && kTileN == 64;

  // Page-table entries are resolved kAhead + 1 n_blocks ahead of the n_block that is computed.
  static constexpr int kAhead = (kChunks + kStages - 2) / kChunks;
  static constexpr int kPageBuffers = kAhead + 1;

  // Code of its own for plain calls over pages is for tiles of short work, where the code that is not run costs time.
  static constexpr bool kNoPagedCall = kMmaM > 1 || kSharedP;

  static_assert(kRowsPerWarp % 16 == 0 && kKeysPerWarp % 8 == 0 && kTileN % kVChunk == 0 && kVChunk % 16 == 0);
  static_assert(kKChunk % kSubtileCols == 0 && kVCols % kSubtileCols == 0 && kHeadDim % 16 == 0);
  static_assert(kMmaN % 2 == 0 || kKChunk % 32 == 0);
  static_assert((kVSubtiles * kWarpsPerSubtile) % kWarpsN == 0 && kPartTiles >= 1);
  static_assert(kTileN <= kThreads && kStages >= 2);

  // Where a key lies in global memory, in elements from the head's base; -1 when it is not read, because it is not live
  // or lies on a page that the pool does not have.
  struct PagedRow {
    long long k;
    long long v;
    BROADHEAD_DEVICE bool unread() const { return k < 0; }
  };

  struct SharedStorage {
    alignas(1024) Element q[kTileM * kQCols];  // O on its way out, of wide warps
    alignas(1024) Element ring[kStages][kStageElems];
    alignas(1024) Element p[kSharedP ? kTileM * kPCols : 8];
    float row_stats[kSharedP ? kWarpsN * kTileM : 1];  // partial row max, later partial row sum
    PagedRow pages[kPageBuffers][kTileN];
    int any_missing;  // not 0 once the tile has met a key whose page is not in the pool
    TileState<Element> state;
  };
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm80
