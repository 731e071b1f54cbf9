// Compile-time shape of the Hopper kernels for e4m3 q, k and v (head_dim <= 256), bf16 out.
//
// wgmma takes 8-bit operands only with the reduction dimension contiguous: V, which comes key by key, is transposed on
// its way by two warps of the producer warpgroup.
#pragma once

#include "common/math.h"
#include "tma/missing_keys.h"
#include "tma/tensor_maps.h"
#include "tma/tile_layout.h"
#include "tma/work_source.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_, int kMinBlocks_, int kSmemLimit_,
          ColumnTail kTail_ = ColumnTail::kNone>
struct Fp8Traits {
  using Element = Element_;
  using OutElement = cutlass::bfloat16_t;
  static_assert(sizeof(Element) == 1);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kStages = 2;
  static constexpr int kCluster = 1;
  static constexpr bool kPlainCall = false;  // common/plain_call.h
  static constexpr bool kSplits = true;
  static constexpr bool kFillsDense = kHeadDim != 192;      // TileShape::fills; C7511 there
  static constexpr bool kFirstTileEarly = kHeadDim != 192;  // TilePoster; C7511 as well
  static constexpr bool kPages = true;
  static constexpr int kMinBlocks = kMinBlocks_;         // CTAs of a multiprocessor
  static constexpr bool kNoPagedCall = kHeadDim == 192;  // ptxas 13.0 serialises its wgmma there (C7511)
  static constexpr bool kNoSplitCall = kNoPagedCall;
  static constexpr bool kMaskByWords = false;
  static constexpr ColumnTail kTail = kTail_;
  using WithTail =
      Fp8Traits<Element_, kHeadDim_, kHeadDimV_, kTileM_, kTileN_, kMinBlocks_, kSmemLimit_, ColumnTail::kSubtiles>;
  // ptxas 13.0 serialises the wgmma of head_dim 192 wherever griddepcontrol stands in the kernel.
  static constexpr bool kDependentLaunch = false;

  static constexpr int kConsumers = kTileM / 64;  // warpgroups of 64 rows
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kMinBlocks) / 8 * 8;  // of a thread
  static constexpr int kProducerRegisters = kConsumers == 3 ? 56 : 40;
  static constexpr int kConsumerRegisters =
      min_int(232, (kLaunchRegisters * (kConsumers + 1) - kProducerRegisters) / kConsumers / 8 * 8);
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= kLaunchRegisters * (kConsumers + 1));

  // P V of an n_block goes to accumulators of its own, kPartCols columns at a time, and is then added to O in fp32. The
  // tensor cores cut every product at 13 bits below the largest sum: measured, a sum of positive products is 0.18 %
  // short after 128 keys, 1.4 % after 1024, and stands still before 128k.
  // They take the registers of S where there are too few for both.
  static constexpr bool kInScores = kHeadDimV > 128 || kMinBlocks > 1;
  static constexpr int kParts = ceil_div(kHeadDimV, kInScores ? min_int(kTileN, 128) : 128);
  static constexpr int kPartCols = kHeadDimV / kParts;
  static_assert(kPartCols * kParts == kHeadDimV && kPartCols % 32 == 0 && (!kInScores || kPartCols <= kTileN));
  static constexpr bool kPingPong = kConsumers > 1;

  using QLayout = TileLayout<Element, kHeadDim>;
  static constexpr int kSubtileRows = kTail == ColumnTail::kSubtiles ? kTileN : 0;
  using KLayout = TileLayout<Element, kHeadDim, kSubtileRows>;
  using VLayout = TileLayout<Element, kHeadDimV, kSubtileRows>;  // as it comes
  using TransposedLayout = TileLayout<Element, kTileN>;          // kHeadDimV rows of kTileN keys
  static constexpr int kVKeys = kTileN;                          // keys in a stage of V
  static constexpr int kKeyTiles = kTileN / 8;
  static constexpr int kGatherPieces = 2;  // an n_block is gathered in so many pieces
  static constexpr int kTransposeWarps = 2;
  static constexpr int kSchedulerWarp = 3;

  static_assert(kTileM % 64 == 0 && kTileN % 64 == 0 && kHeadDimV % 32 == 0);

  struct SharedStorage : WorkStorage<Element> {
    Barrier q_full;                        // 1 arrival + bytes
    Barrier q_empty;                       // each consumer warp
    Barrier k_full[kStages];               // 1 arrival + bytes, or every gathering thread
    Barrier k_empty[kStages];              // each consumer warp
    Barrier v_full[kStages];               // as k_full
    Barrier v_empty[kStages];              // each transposing warp
    Barrier transposed_full[kStages];      // each transposing warp
    Barrier transposed_empty[kStages];     // each consumer warp
    MissingKeys<kTileN> missing[kStages];  // of K
    alignas(1024) Element q[kTileM * kHeadDim];
    alignas(1024) Element k[kStages][kTileN * kHeadDim];
    alignas(1024) Element v[kStages][kTileN * kHeadDimV];
    alignas(1024) Element transposed_v[kStages][kTileN * kHeadDimV];
  };
  static_assert(kMinBlocks * (sizeof(SharedStorage) + 1024) <= 228 * 1024, "a multiprocessor has no room for the CTAs");
  static_assert(sizeof(SharedStorage) <= kSmemLimit_, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm90
