// Compile-time shape of the Hopper backward kernels for 256 < head_dim <= 512: a cluster of two CTAs a tile.
//
// "Rows", "columns", the first and the second operand are those of sm90/backward/traits.h. A tile of 64 rows of both
// operands and the columns that stream by are more than the shared memory of a CTA, and its gradients more than its
// registers. So CTA 0 has the first operand and CTA 1 the second:
//
//   keys:     CTA 0:  S^T = K Q^T | P -> CTA 1         dK += dS^T Q     CTA 1:  dP^T = V dO^T | dS -> CTA 0   dV += P^T
//   dO queries:  CTA 0:  S = Q K^T   | P -> CTA 1         dQ += dS K       CTA 1:  dP = dO V^T   | dS -> CTA 0
//
// What they send has 16 bits a number and goes into the other's shared memory as operand A of its gradient. Nothing is
// loaded twice.
//
// Warpgroups of a CTA: producer, scores (S or dP), and two for the left and the right columns of the gradient.
#pragma once

#include "common/backward_work.h"
#include "common/math.h"
#include "tma/barrier.h"
#include "tma/ring_state.h"
#include "tma/tensor_maps.h"
#include "tma/tile_layout.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Element_, int kHeadDim_, Side kSide_, int kStages_, bool kCapped_ = false>
struct PairSide {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Side kSide = kSide_;
  static constexpr bool kKeys = kSide == Side::kKeys;
  static constexpr int kRows = 64;
  static constexpr int kCols = 64;
  static constexpr int kStages = kStages_;
  static constexpr bool kCapped = kCapped_;  // with a softcap
  using Capped = PairSide<Element_, kHeadDim_, kSide_, kStages_, true>;

  static constexpr int kCluster = 2;
  static constexpr int kThreads = 4 * 128;
  // What a thread has in the producer, in the scores and in each of two gradient warpgroups; 512 in all.
  static constexpr int kProducerRegisters = 48;
  static constexpr int kScoreRegisters = 144;
  static constexpr int kGradientRegisters = 160;
  static_assert(kProducerRegisters + kScoreRegisters + 2 * kGradientRegisters <= 512);

  // Columns of head_dim of one wgmma of a gradient: ptxas refuses an accumulator of 128 registers in a CTA of 512
  // threads. A warpgroup has kParts such parts, `half` of the columns.
  static constexpr int kHalfCols = kHeadDim / 2;
  static constexpr int kPartCols = kHalfCols > 192 ? kHalfCols / 2 : kHalfCols;
  static constexpr int kParts = kHalfCols / kPartCols;
  static_assert(kPartCols % 64 == 0 && kParts * kPartCols * 2 == kHeadDim);

  // A stage is kChunks pieces of kPartCols columns, each loaded and freed alone. They come in the order in which the
  // gradient frees them: the first part of either half, then the second.
  static constexpr int kChunks = 2 * kParts;
  BROADHEAD_DEVICE static constexpr int chunk_of(int half, int part) { return part * 2 + half; }
  BROADHEAD_DEVICE static constexpr int first_column(int chunk) {
    return chunk % 2 * kHalfCols + chunk / 2 * kPartCols;
  }

  // Subtiles of 64 columns of head_dim with all their rows in one piece: each is a box, whatever head_dim is.
  using Rows = TileLayout<Element, kHeadDim, kRows>;
  using Chunk = TileLayout<Element, kPartCols, kCols>;
  using FirstRows = Rows;
  using SecondRows = Rows;
  using FirstCols = Chunk;
  using SecondCols = Chunk;
  static_assert(Rows::kRowBytes == 128 && Chunk::kRowBytes == 128);
  static constexpr int kChunkBytes = Chunk::kSubtiles * Chunk::kSubtileStride;

  // The rows' columns of the first chunks stay in registers as operand A of the scores: shared memory, which wgmma
  // reads again and again, is what bounds these kernels.
  static constexpr int kRegisterChunks = kParts;
  static constexpr int kRegisterSteps = kRegisterChunks * Chunk::kSteps;

  // P or dS: columns side by side.
  static constexpr int kColTiles = kCols / 8;
  static constexpr int kWeightSteps = kCols / 16;  // as operand A
  using WeightLayout = TileLayout<Element, kCols, kRows>;
  static constexpr int kWeightBytes = kRows * WeightLayout::kBytes;

  // With a softcap dS asks for P times its slope: keys, beside P; queries, instead of P, which has no other use there.
  static constexpr bool kSendsSlope = kCapped && kKeys;

  // What CTA `rank` receives a step, and from how many arrivals of the other it learns that what it sent has been read.
  BROADHEAD_DEVICE static constexpr int received_bytes(std::uint32_t rank) {
    return rank == 1 && kSendsSlope ? 2 * kWeightBytes : kWeightBytes;
  }
  BROADHEAD_DEVICE static constexpr int readers_of_sent(std::uint32_t rank) { return rank == 1 ? 2 : kKeys ? 6 : 4; }

  // Whether CTA `rank` has a gradient.
  BROADHEAD_DEVICE static constexpr bool has_gradient(std::uint32_t rank) { return kKeys || rank == 0; }

  // Each CTA has one, with the same layout, so that an address in one holds in the other.
  struct SharedStorage {
    alignas(1024) Element rows[kRows * kHeadDim];
    alignas(1024) Element chunks[kStages][kChunks][kCols * kPartCols];
    alignas(1024) Element weights[2][kRows * kCols];  // written by the other CTA
    union BesideWeights {
      Element slopes[kSendsSlope ? 2 : 1][kSendsSlope ? kRows * kCols : 1];     // of CTA 1
      std::uint32_t given[kKeys ? kStages : 1][kKeys ? kRows : 1][kCols / 32];  // store_given: of CTA 0
    };
    alignas(1024) BesideWeights beside;
    // LSE and D of the queries that stream by: see QueryStats and stat_place.
    alignas(16) float lse[kKeys ? kStages : 1][kCols];
    alignas(16) float delta[kKeys ? kStages : 1][kCols];
    alignas(8) QueryInterval seen[kKeys ? kRows : 1];  // by each key of the tile
    Barrier rows_full;                                 // 1 arrival + bytes
    Barrier chunk_full[kStages][kChunks];              // 1 arrival + bytes
    Barrier chunk_empty[kStages][kChunks];             // scores; gradient, where there is one
    Barrier prepared[kStages];     // the lanes of the warp that brings the stats and clears dead rows
    Barrier stats_empty[kStages];  // 4 warps of the scores
    Barrier received[2];           // 1 arrival (of a reader, ahead of time) + bytes
    Barrier sent_read[2];          // readers_of_sent
    BackwardWork work;
  };
};

template <class Element_, int kHeadDim_, int kHeadDimV_, int kStages, int kSmemLimit>
struct PairBackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static_assert(kHeadDim == kHeadDimV, "both CTAs of a cluster have tiles of the same shape");
  using Keys = PairSide<Element, kHeadDim, Side::kKeys, kStages>;
  using Queries = PairSide<Element, kHeadDim, Side::kQueries, kStages>;
  using SharedStorage = typename Keys::Capped::SharedStorage;  // the largest
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tiles do not fit the shared memory their row promises");
};

}  // namespace broadhead::sm90
