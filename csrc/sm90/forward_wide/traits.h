// Compile-time shapes of the wide Hopper kernel: 256 < head_dim <= 512, and absorbed MLA (head_dim_v 512).
//
// O of 64 rows x 512 columns does not fit the registers of one warpgroup: two own 256 each, or 256 and 128. A third
// computes S and P for both. A cluster of two CTAs, with neighbouring m_blocks, shares every K and V stage by
// multicast: alone, a CTA of 64 rows would need 1.7 times the bandwidth of the L2. Where a head's queries make but
// one tile a CTA is alone (kCluster 1): of two, one would have no rows.
#pragma once

#include "common/math.h"
#include "tma/missing_keys.h"
#include "tma/tensor_maps.h"
#include "tma/tile_layout.h"
#include "tma/work_source.h"

namespace broadhead::sm90 {

using namespace tma;

// Stages [kBegin, kBegin + kCount) of Storage::ring. Who fills or reads stages of a ring takes all of them in turn: a
// parity tells a fill from the one before, not from the one before that. (O of absorbed MLA takes its half; S, which it
// follows, has seen the others.)
template <int kBegin, int kCount>
class StageRing : public RingState<kCount> {
 public:
  BROADHEAD_DEVICE std::uint32_t stage() const { return kBegin + RingState<kCount>::stage(); }
};

// What both kinds have in common.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_, int kCluster_>
struct WideShape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kCluster = kCluster_;
  static constexpr bool kPlainCall = false;  // common/plain_call.h
  static constexpr bool kSplits = true;
  static constexpr bool kFillsDense = false;  // TileShape::fills
  static constexpr bool kPages = true;
  static constexpr int kMinBlocks = 1;
  static constexpr bool kNoPagedCall = true;
  static constexpr bool kNoSplitCall = true;
  static constexpr bool kMaskByWords = true;
  static constexpr ColumnTail kTail = ColumnTail::kGroups;
  static constexpr bool kDependentLaunch = true;
  static_assert(kTileM == 64 && kTileN == 64 && (kCluster == 1 || kCluster == 2));

  // Warpgroups: producer, S, O left, O right. Registers of a thread of each; 512 in all.
  static constexpr int kThreads = 4 * 128;
  static constexpr int kProducerRegisters = 48;
  static constexpr int kOutputRegisters = 160;
  static constexpr int kScoreRegisters = 144;
  static_assert(kProducerRegisters + kScoreRegisters + 2 * kOutputRegisters <= 512);
  static constexpr int kLoaderWarps = 3;
  static constexpr int kSchedulerWarp = 3;

  // The ring's stages. Small ones are refilled sooner.
  // PERF(H200, 5 stages of 32 KB -> 11 of 16 KB: see docs/performance-log.md)
  static constexpr int kStageBytes = 16384;
  // A stage of kTileN keys x this many columns is what S takes at a time.
  static constexpr int kScoreCols = kStageBytes / (kTileN * static_cast<int>(sizeof(Element)));
  using ScoreLayout = TileLayout<Element, kScoreCols>;
  static_assert(ScoreLayout::kRowBytes == 128 && kTileM <= kTileN);

  // Columns of one wgmma: ptxas refuses an accumulator of 128 registers in a CTA of 512 threads. O left has two such
  // parts, O right the rest.
  static constexpr int kPartCols = 128;
  static constexpr int kLeftParts = 2;
  static constexpr int kRightParts = kHeadDimV / kPartCols - kLeftParts;
  static_assert((kLeftParts + kRightParts) * kPartCols == kHeadDimV && kRightParts >= 1 && kRightParts <= kLeftParts);
  static constexpr int kKeyTiles = kTileN / 8;
  using PLayout = TileLayout<Element, kTileN>;

  // What a CTA's arrivals on a stage's `empty` count for: that of S (K), both of O (V), S and one of O (V of absorbed
  // MLA), or the four warps of S that read Q.
  static constexpr int kReleases = 4;

  // Beside P: what O must be multiplied by before this n_block's P V is added.
  struct Rescale {
    float factor[kTileM];
    int needed[4];  // of each warp's 16 rows
  };

  template <class Base, int kStages, int kQSharedCols>
  struct Storage : Base {
    alignas(1024) char ring[kStages][kStageBytes];
    alignas(1024) Element q[kTileM * kQSharedCols];
    alignas(1024) Element p[2][kTileM * kTileN];
    Rescale rescale[2];
    float inverse[2][kTileM];
    Mailbox mailbox;
    Barrier q_full;   // 1 arrival for each of q and qv, + bytes
    Barrier q_empty;  // 4 warps of S
    Barrier full[kStages];
    Barrier empty[kStages];
    Barrier p_full[2];                           // 4 warps of S
    Barrier p_empty[2];                          // 8 warps of O
    Barrier inverse_full[2];                     // 4 warps of S
    Barrier inverse_empty[2];                    // 8 warps of O
    MissingKeys<kTileN> missing[kStages];        // of an n_block, beside the stage of K with its first columns
    std::uint32_t kept_missing[4][kTileN / 32];  // a warp of S keeps those of the n_block it computes, if there are any
  };
};

// K and V are cut differently: K by columns, V by keys. Each has a ring of its own; Q's first columns come through K's.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_, int kQRegisterCols_, int kCluster_,
          int kSmemLimit_>
struct WideTraits : WideShape<Element_, kHeadDim_, kHeadDimV_, kTileM_, kTileN_, kCluster_> {
  using Shape = WideShape<Element_, kHeadDim_, kHeadDimV_, kTileM_, kTileN_, kCluster_>;
  using Element = Element_;
  static constexpr bool kWithQv = false;
  static constexpr int kStages = kHeadDim_ > 384 ? 11 : 12;
  using KRing = StageRing<0, 6>;
  using VRing = StageRing<6, kStages - 6>;
  static constexpr int kKChunk = Shape::kScoreCols;
  static constexpr int kKChunks = kHeadDim_ / kKChunk;
  static constexpr int kVKeys =
      Shape::kStageBytes / (kHeadDimV_ * static_cast<int>(sizeof(Element))) / 16 * 16;  // of a stage
  static constexpr int kVChunks = kTileN_ / kVKeys;
  using KLayout = typename Shape::ScoreLayout;
  using VLayout = TileLayout<Element, kHeadDimV_>;
  static_assert(kKChunks * kKChunk == kHeadDim_ && kVKeys % 16 == 0);

  // Stages of an n_block that S reads.
  static constexpr int kScoreChunks = kKChunks;
  static constexpr int kScoreShare = Shape::kReleases;

  // Q: the first columns stay in registers (they come through stages of the ring), the others in shared memory.
  static constexpr int kQRegisterChunks = kQRegisterCols_ / kKChunk;
  static constexpr int kQSharedSubtile = 0;  // where they begin
  using QLayout = TileLayout<Element, kHeadDim_>;
  static_assert(kQRegisterCols_ % kKChunk == 0);

  using SharedStorage = typename Shape::template Storage<WorkStorage<Element>, kStages, kHeadDim_ - kQRegisterCols_>;
  static_assert(sizeof(SharedStorage) <= kSmemLimit_, "the tile does not fit the shared memory its row promises");
};

// Absorbed MLA: S = q K^T + qv V^T. V is cut by columns like K above, and its stages serve twice: S reads them first,
// then the one O warpgroup whose columns they are. K has few columns and a buffer of its own, free again early.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_, int kQRegisterCols_, int kCluster_,
          int kSmemLimit_>
struct AbsorbedTraits : WideShape<Element_, kHeadDim_, kHeadDimV_, kTileM_, kTileN_, kCluster_> {
  using Shape = WideShape<Element_, kHeadDim_, kHeadDimV_, kTileM_, kTileN_, kCluster_>;
  using Element = Element_;
  static constexpr bool kWithQv = true;
  // V of two n_blocks, S being an n_block ahead, and what the next one begins with.
  static constexpr int kStages = 10;
  using KRing = StageRing<0, kStages>;  // one for qv's first columns and V
  using VRing = KRing;
  static constexpr int kKChunk = kHeadDim_;
  static constexpr int kKChunks = 1;
  static constexpr int kVKeys = kTileN_;
  static constexpr int kVChunks = kHeadDimV_ / Shape::kScoreCols;
  using KLayout = TileLayout<Element, kHeadDim_>;
  using VLayout = typename Shape::ScoreLayout;
  static_assert(KLayout::kRowBytes == 128 && kVChunks * Shape::kScoreCols == kHeadDimV_);
  static_assert(Shape::kPartCols == Shape::kScoreCols && Shape::kLeftParts == 2 && Shape::kRightParts == 2 &&
                kVChunks == 4);
  static_assert(kStages >= 2 * kVChunks, "S of a block is complete before O reads V of the block above");

  static constexpr int kScoreChunks = kVChunks;
  static constexpr int kScoreShare = Shape::kReleases / 2;

  // The first columns of qv stay in registers; q and the other columns of qv lie in shared memory.
  static constexpr int kQRegisterChunks = kQRegisterCols_ / Shape::kScoreCols;
  static constexpr int kQSharedSubtile = KLayout::kSubtiles;
  using QLayout = TileLayout<Element, kHeadDimV_>;
  static_assert(kQRegisterCols_ % Shape::kScoreCols == 0);

  struct KStorage : WorkStorage<Element> {
    Barrier k_full;   // 1 arrival + bytes, or every gathering thread
    Barrier k_empty;  // S of every CTA of the cluster
    alignas(1024) Element k[kTileN_ * kHeadDim_];
  };
  using SharedStorage = typename Shape::template Storage<KStorage, kStages, kHeadDim_ + kHeadDimV_ - kQRegisterCols_>;
  static_assert(sizeof(SharedStorage) <= kSmemLimit_, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm90
