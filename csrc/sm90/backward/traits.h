// Compile-time shape of the Hopper backward kernels of one row of python/broadhead/support.py.
//
// A CTA keeps a tile of one side of S in shared memory, and tiles of the other side stream by it, as in the portable
// kernels. "Rows" are those of the side that is kept, "columns" those of the side that streams by; the first operand is
// that of S (K or Q), the second that of dP (V or dO):
//
//   keys:     S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q
//   queries:  S = Q K^T      dP = dO V^T      dQ += dS K
//
// Two consumer warpgroups compute. With 128 rows each owns 64 of them. With 64 keys, where dK and dV of a row are more
// than a thread has registers for, both own all of them: one computes S, P and dV, and hands P to the other, which
// computes dP, dS and dK (kSplitProducts).
//
// A fused kernel (kFused) keeps keys and gives dQ as well: dS of both warpgroups goes through shared memory, each
// multiplies it by K for a part of dQ, and a warp of the producer adds the result to fp32 sums in global memory. Those
// additions have no order.
#pragma once

#include <type_traits>

#include "common/backward_work.h"
#include "common/math.h"
#include "tma/barrier.h"
#include "tma/ring_state.h"
#include "tma/tensor_maps.h"
#include "tma/tile_layout.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Element_, int kHeadDim_, int kHeadDimV_, Side kSide_, int kRows_, int kCols_, int kStages_,
          int kStages2_, bool kFused_ = false, bool kCapped_ = false>
struct BackwardSide {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr Side kSide = kSide_;
  static constexpr bool kKeys = kSide == Side::kKeys;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kStages = kStages_;    // of the first operand's columns
  static constexpr int kStages2 = kStages2_;  // of the second's
  static constexpr bool kSplitProducts = kRows == 64;
  // Steps of 16 columns of the scores whose kept operand lies in registers: shared memory, which wgmma reads again and
  // again, is what bounds these kernels. As many as there are registers for.
  static constexpr int kKeptSteps = !kKeys                                     ? 0
                                    : kSplitProducts                           ? (kHeadDim <= 192 ? kHeadDim / 16 : 6)
                                    : kFused_ && kHeadDim <= 64 && kCols == 64 ? kHeadDim / 16
                                                                               : 0;
  static constexpr int kKeptStepsV = kKeptSteps == kHeadDim / 16 ? kHeadDimV / 16 : kKeptSteps;
  static constexpr bool kFused = kFused_;
  static constexpr bool kCapped = kCapped_;  // with a softcap, whose slope is worked out beside P
  using Capped =
      BackwardSide<Element_, kHeadDim_, kHeadDimV_, kSide_, kRows_, kCols_, kStages_, kStages2_, kFused_, true>;

  static constexpr int kCluster = 1;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kHeadDim <= 64 ? 56 : 40;
  static constexpr int kConsumerRegisters = kHeadDim <= 64 ? 224 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kThreads / 8 * 8 * (kConsumers + 1));

  // Subtiles of 64 columns of head_dim with all their rows in one piece: each is a box, whatever head_dim is.
  static constexpr int kTileColumns = round_up(kHeadDim, 64);
  static constexpr int kTileColumnsV = round_up(kHeadDimV, 64);
  using FirstRows = TileLayout<Element, kTileColumns, kRows>;
  using SecondRows = TileLayout<Element, kTileColumnsV, kRows>;
  using FirstCols = TileLayout<Element, kTileColumns, kCols>;
  using SecondCols = TileLayout<Element, kTileColumnsV, kCols>;
  static constexpr int kRowBytes = FirstRows::kRowBytes;
  static_assert(kRowBytes == 128 && SecondRows::kRowBytes == 128);

  static constexpr int kColTiles = kCols / 8;      // of S and dP
  static constexpr int kWeightSteps = kCols / 16;  // of P and dS as operand A
  static_assert(kRows == 128 || (kRows == 64 && kKeys));
  static_assert(kCols % 32 == 0 && kCols <= 256 && kHeadDim % 32 == 0 && kHeadDimV % 32 == 0);
  static_assert(!kKeys || kStages == kStages2, "Q and dO of a step are loaded and freed together");
  static_assert(!kFused || (kKeys && kRows == 128 && (kCols == 64 || kCols == 128)), "a warpgroup has 64 rows of dQ");

  // dS of a step as the operand A of dQ: the keys of a warpgroup are a subtile.
  using ScoreLayout = TileLayout<Element, kRows, kCols>;
  // A warpgroup computes 64 queries of a step's dQ: of a step of 64 half the columns, of 128 its own 64.
  static constexpr bool kDqByRows = kCols == 128;
  static constexpr int kDqCols = kDqByRows ? kTileColumns : kTileColumns / kConsumers;
  static constexpr int kDqTiles = kDqCols / 8;
  // D as columns of dO: a product of them and -1 takes D from dP. Where consumers have no registers to read D ahead,
  // and with the exponents of bf16. D in three pieces holds all of its 24 bits.
  static constexpr bool kDeltaColumns = kFused && !kCapped && std::is_same_v<Element, cutlass::bfloat16_t>;
  // 128 queries leave no registers for P in 16 bits beside P and dP in 32. It is packed behind dS; but where masks or a
  // softcap take registers, dS is made of the 16 bits.
  static constexpr bool kPackLate = kFused && kCols == 128 && !kCapped && !kDeltaColumns;
  static constexpr bool kPackedWeights = kFused && kCols == 128;
  // Consumers keep their thread's number in a register: reading it again takes long, but 128 queries leave none.
  static constexpr bool kKeepsThread = !(kFused && kCols == 128);
  // Column tiles whose LSE is read while S is multiplied, and whose D while dP is, as registers allow.
  static constexpr int kEarlyLse = kCapped ? 0 : kFused && kCols == 128 ? 4 : kCols / 8;
  static constexpr int kEarlyDelta = kCapped || (kFused && kCols == 128) ? 0 : 4;
  static constexpr bool kPairedStats = !kCapped && !(kFused && kCols == 128);  // see stat_place
  // wgmma reads 16 of them; a row of 64 bytes is the narrowest that it takes here.
  static constexpr int kStatCols = 32;
  using StatRows = TileLayout<Element, kStatCols, 64>;
  using StatCols = TileLayout<Element, kStatCols, kCols>;
  // The sums of dQ, for common/dq_sums.h: what a warpgroup adds in a step is one piece, [column tile][128 threads].
  struct DqSums {
    static constexpr int kRows = kCols;
    static constexpr int kColumns = kTileColumns;
    BROADHEAD_HOST_DEVICE static constexpr int block(int row_tile, int col_tile) {
      return row_tile / 4 * (kColumns / 8 * 4) + col_tile * 4 + row_tile % 4;
    }
  };

  struct Tiles {
    alignas(1024) Element first_rows[kRows * kTileColumns];
    alignas(1024) Element second_rows[kRows * kTileColumnsV];
    alignas(1024) Element first_cols[kStages][kCols * kTileColumns];
    alignas(1024) Element second_cols[kStages2][kCols * kTileColumnsV];
  };
  struct FusedTiles : Tiles {
    alignas(1024) Element ds[2][kCols * kRows];
    alignas(128) float4 dq[kConsumers][kDqTiles * 128];  // as the accumulators lie: [column tile][thread]
    alignas(1024) Element minus_ones[kDeltaColumns ? 64 * kStatCols : 8];
    alignas(1024) Element delta_cols[kDeltaColumns ? kStages : 1][kDeltaColumns ? kCols * kStatCols : 8];
  };
  struct SharedStorage : std::conditional_t<kFused, FusedTiles, Tiles> {
    alignas(16) uint4 p[kSplitProducts ? kWeightSteps * 128 : 1];  // [step][thread]: P, times the softcap's slope
    // LSE and D of the queries that stream by: see QueryStats and stat_place.
    alignas(16) float lse[kKeys ? kStages : 1][kCols];
    alignas(16) float delta[kKeys ? kStages : 1][kCols];
    std::uint32_t given[kKeys ? kStages : 1][kKeys ? kRows : 1][kCols / 32];  // store_given
    alignas(8) QueryInterval seen[kKeys ? kRows : 1];  // by each key of the tile; none where it does not exist
    Barrier rows_full[2];                              // 1 arrival + bytes
    Barrier first_full[kStages];                       // 1 arrival + bytes
    Barrier first_empty[kStages];                      // each consumer warp
    Barrier second_full[kStages2];
    Barrier second_empty[kStages2];
    Barrier stats_full[kStages];  // keys: the lanes of the warp that brings the stats, and clears dead rows
    Barrier keys_ready;           // keys: the lanes of the two warps that prepare them
    // Fused kernels:
    Barrier ds_full[2];            // each consumer warp
    Barrier ds_empty[2];           // likewise
    Barrier dq_full[kConsumers];   // each warp
    Barrier dq_empty[kConsumers];  // 1 arrival
    BackwardWork work;
  };
};

// `kKeyRows` keys are kept, `kKeyCols` queries stream by; `kQueryRows` queries are kept, `kQueryCols` keys stream by.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kKeyRows, int kKeyCols, int kKeyStages, int kQueryRows,
          int kQueryCols, int kStagesK, int kStagesV, int kSmemLimit>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  using Keys = BackwardSide<Element, kHeadDim, kHeadDimV, Side::kKeys, kKeyRows, kKeyCols, kKeyStages, kKeyStages>;
  using Queries =
      BackwardSide<Element, kHeadDim, kHeadDimV, Side::kQueries, kQueryRows, kQueryCols, kStagesK, kStagesV>;
  // That of the kernel which takes more.
  using SharedStorage =
      std::conditional_t<(sizeof(typename Keys::SharedStorage) > sizeof(typename Queries::SharedStorage)),
                         typename Keys::SharedStorage, typename Queries::SharedStorage>;
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tiles do not fit the shared memory their row promises");
};

// `kKeyRows` keys are kept, `kKeyCols` queries stream by, and dQ is added to sums in global memory.
template <class Element_, int kHeadDim_, int kHeadDimV_, int kKeyRows, int kKeyCols, int kKeyStages, int kSmemLimit>
struct FusedBackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  using Keys =
      BackwardSide<Element, kHeadDim, kHeadDimV, Side::kKeys, kKeyRows, kKeyCols, kKeyStages, kKeyStages, true>;
  using SharedStorage = typename Keys::SharedStorage;
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tiles do not fit the shared memory their row promises");
};

}  // namespace broadhead::sm90
