// Compile-time shape of the wide Hopper kernel (256 < head_dim <= 512).
//
// O of 64 rows x 512 columns does not fit the registers of one warpgroup: two own half of the columns each. A third
// computes S and P for both. A cluster of two blocks, neighbouring query tiles, shares every K and V stage by
// multicast: alone, a block of 64 rows would need 1.7 times the bandwidth of the L2.
#pragma once

#include "sm90/forward_traits.h"

namespace broadhead::sm90 {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_, int kQRegisterCols_, int kSmemLimit_>
struct WideTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kCluster = 2;
  static_assert(kTileM == 64 && kTileN == 64);

  // Warpgroups: producer, S, O left, O right. Registers of a thread of each; 512 in all.
  static constexpr int kThreads = 4 * 128;
  static constexpr int kProducerRegisters = 48;
  static constexpr int kOutputRegisters = 160;
  static constexpr int kScoreRegisters = 144;
  static_assert(kProducerRegisters + kScoreRegisters + 2 * kOutputRegisters <= 512);
  static constexpr int kLoaderWarps = 3;
  static constexpr int kSchedulerWarp = 3;

  // A stage holds kTileN keys x kKChunk columns of K, or kVChunk keys of V. Small ones are refilled sooner.
  // PERF(H200, 5 stages of 32 KB -> 11 of 16 KB: see docs/performance-log.md)
#ifdef DEV32
  static constexpr int kStageBytes = 32768;
  static constexpr int kStages = 5;
#else
  static constexpr int kStageBytes = 16384;
  static constexpr int kStages = 11;
#endif
  static constexpr int kKChunk = kStageBytes / (kTileN * static_cast<int>(sizeof(Element)));
  static constexpr int kKChunks = kHeadDim / kKChunk;
  static constexpr int kVChunk = kStageBytes / (kHeadDimV * static_cast<int>(sizeof(Element)));
  static constexpr int kVChunks = kTileN / kVChunk;
  using KLayout = TileLayout<Element, kKChunk>;
  using VLayout = TileLayout<Element, kHeadDimV>;
  static_assert(kKChunks * kKChunk == kHeadDim && kVChunk % 16 == 0 && KLayout::kRowBytes == 128);

  // Q: the first columns stay in registers (they come through stages of the ring), the others in shared memory.
  static constexpr int kQRegisterCols = kQRegisterCols_;
  static constexpr int kQRegisterChunks = kQRegisterCols / kKChunk;
  static constexpr int kQSharedCols = kHeadDim - kQRegisterCols;
  using QLayout = TileLayout<Element, kHeadDim>;
  static_assert(kQRegisterCols % kKChunk == 0 && kTileM <= kTileN);

  static constexpr int kOutputCols = kHeadDimV / 2;  // of a warpgroup
  // Of one wgmma: ptxas refuses an accumulator of 128 registers in a block of 512 threads.
  static constexpr int kPartCols = 128;
  static constexpr int kParts = kOutputCols / kPartCols;
  static_assert(kParts * kPartCols == kOutputCols);
  static constexpr int kKeyTiles = kTileN / 8;
  using PLayout = TileLayout<Element, kTileN>;

  // What a block's arrivals on a stage's `empty` count for: that of S, or both of O, or the four warps of S that read Q.
  static constexpr int kReleases = 4;

  // Beside P: what O must be multiplied by before this block's P V is added.
  struct Rescale {
    float factor[kTileM];
    int needed[4];  // of each warp's 16 rows
  };

  struct SharedStorage : WorkStorage<Element> {
    alignas(1024) char ring[kStages][kStageBytes];
    alignas(1024) Element q[kTileM * kQSharedCols];
    alignas(1024) Element p[2][kTileM * kTileN];
    Rescale rescale[2];
    float inverse[2][kTileM];
    Mailbox mailbox;
    Barrier q_full;   // 1 arrival + bytes
    Barrier q_empty;  // 4 warps of S
    Barrier full[kStages];
    Barrier empty[kStages];
    Barrier p_full[2];   // 4 warps of S
    Barrier p_empty[2];  // 8 warps of O
    Barrier inverse_full[2];   // 4 warps of S
    Barrier inverse_empty[2];  // 8 warps of O
  };
  static_assert(sizeof(SharedStorage) <= kSmemLimit_, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm90
