// Compile-time shape of the Hopper forward kernel for 16-bit inputs up to head_dim 256, derived from a row of
// python/broadhead/support.py.
#pragma once

#include "common/math.h"
#include "tma/missing_keys.h"
#include "tma/tensor_maps.h"
#include "tma/tile_layout.h"
#include "tma/work_source.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Element_, int kHeadDim_, int kHeadDimV_, int kTileM_, int kTileN_, int kStages_, int kOverlap_,
          int kMinBlocks_, int kSmemLimit_, ColumnTail kTail_ = ColumnTail::kNone>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kStages = kStages_;
  // S of the next n_block is computed beside O += P V of this one. kTwoP: registers allow two P beside S, so that the
  // softmax need not look for the maximum first.
  static_assert(kOverlap_ == 1 || kOverlap_ == 2);
  static constexpr bool kTwoP = kOverlap_ == 2;
  static constexpr int kMinBlocks = kMinBlocks_;  // CTAs of a multiprocessor
  static constexpr int kCluster = 1;
  static constexpr ColumnTail kTail = kTail_;
  static constexpr bool kPlainCall = false;  // common/plain_call.h
  static constexpr bool kSplits = true;
  static constexpr bool kFillsDense = true;      // TileShape::fills
  static constexpr bool kFirstTileEarly = true;  // TilePoster
  static constexpr bool kPages = true;
  static constexpr bool kNoPagedCall = false;
  // It would spill.
  static constexpr bool kNoSplitCall = kMinBlocks > 2 || kTileM_ > 128 || (kHeadDim_ == 192 && kHeadDimV_ == 128);
  static constexpr bool kMaskByWords = false;
  // The kernel for head dims that end within a subtile. Strides known at run time would cost registers that it has not.
  using WithTail = ForwardTraits<Element_, kHeadDim_, kHeadDimV_, kTileM_, kTileN_, kStages_, kOverlap_, kMinBlocks_,
                                 kSmemLimit_, ColumnTail::kSubtiles>;
  static constexpr bool kDependentLaunch = true;  // the kernel waits for what is in front of it

  static constexpr int kConsumers = kTileM / 64;  // warpgroups of 64 rows
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Registers of a thread. Their sum over the warpgroups must not exceed what the CTA got at launch: 504 for three
  // warpgroups (168 each), 512 for four (128 each), 256 or 160 for each of two or three CTAs of two; setmaxnreg would
  // wait for ever.
  static constexpr int kLaunchRegisters = min_int(65536 / (kThreads * kMinBlocks) / 8 * 8, 248);
  static constexpr int kProducerRegisters = kMinBlocks > 2 || kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters =
      min_int(240, (kLaunchRegisters * (kConsumers + 1) - kProducerRegisters) / kConsumers / 8 * 8);
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= kLaunchRegisters * (kConsumers + 1));
  // Warpgroups ping-pong. With 256 columns of O the tensor cores are kept busy without.
  static constexpr bool kPingPong = kConsumers > 1 && kHeadDim <= 128;

  // Before a tail subtiles are as wide as they can be, though head_dim 96 is no multiple of that: fewer boxes, and
  // fewer sectors of a row whose address is no multiple of 32 bytes.
  static constexpr int kSubtileRows = kTail == ColumnTail::kSubtiles ? kTileN : 0;
  static constexpr int kColumns = kSubtileRows > 0 ? round_up(kHeadDim, 64) : kHeadDim;
  static constexpr int kColumnsV = kSubtileRows > 0 ? round_up(kHeadDimV, 64) : kHeadDimV;
  using QLayout = TileLayout<Element, kColumns>;
  using KLayout = TileLayout<Element, kColumns, kSubtileRows>;
  using VLayout = TileLayout<Element, kColumnsV, kSubtileRows>;
  static constexpr int kVKeys = kTileN;  // keys in a stage of V
  static constexpr int kKeyTiles = kTileN / 8;
  static constexpr int kOTiles = kHeadDimV / 8;
  // ptxas wants more registers at launch for an instruction with 256 columns of O than two CTAs have.
  static constexpr int kOParts = kMinBlocks > 1 && kHeadDimV > 192 ? 2 : 1;
  static constexpr int kLoaderWarps = 3;  // producer warps that load when they gather; with TMA two do
  static constexpr int kSchedulerWarp = 3;

  static_assert(kTileM % 64 == 0 && kTileN % 16 == 0 && kHeadDimV % 32 == 0);

  struct SharedStorage : WorkStorage<Element> {
    alignas(1024) Element q[kTileM * kColumns];
    alignas(1024) Element k[kStages][kTileN * kColumns];
    alignas(1024) Element v[kStages][kTileN * kColumnsV];
    Barrier q_full;           // 1 arrival + bytes
    Barrier q_empty;          // each consumer warp
    Barrier k_full[kStages];  // 1 arrival + bytes, or every gathering thread
    Barrier k_empty[kStages];
    Barrier v_full[kStages];
    Barrier v_empty[kStages];
    MissingKeys<kTileN> missing[kStages];  // of K
  };
  static_assert(sizeof(SharedStorage) <= kSmemLimit_, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm90
