// Compile-time shape of the portable backward kernels of one row of python/broadhead/support.py.
//
// A CTA keeps a tile of one side of S in shared memory, and tiles of the other side stream by it. With keys it keeps K
// and V and gives dK and dV; with queries it keeps Q and dO and gives dQ. In both, S and dP are products of what is
// kept with what streams by, and the gradients are products of P or dS with what streams by:
//
//   keys:     S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q
//   queries:  S = Q K^T      dP = dO V^T      dQ += dS K
//
// "Rows" are those of the side that is kept, "columns" those of the side that streams. Shared-memory tiles are laid out
// as those of the forward kernels (sm80/forward/traits.h).
#pragma once

#include <type_traits>

#include "common/attention_mask.h"
#include "common/dq_sums.h"
#include "common/kv_source.h"
#include "common/math.h"
#include "common/score.h"
#include "common/seqlen_info.h"
#include "mma_sync/atoms.h"

namespace broadhead::sm80 {

enum class Side { kQueries, kKeys };

// The LSE of a sequence's queries, of head 0; null: nobody asks for it.
struct GivenLse {
  const float* first;
  std::int64_t head_stride;
};

// What all threads of a CTA know of its work.
struct BackwardState {
  SeqlenInfo seqlen;
  AttentionMask mask;
  ScoreScale scale;
  float inverse_softcap;
  int batch;
  int head;  // query head, or KV head where keys are kept
  int kv_head;
  int first_row;                // of the tile within the sequence
  int end_row;                  // the sequence's rows of this side
  LiveKeys rows;                // the rows of this side that the sequence has
  LiveKeys cols;                // columns that some row of the tile sees, or is seen by
  GivenLse given_lse;           // keys: where there are such queries, else null
  QueryInterval given_queries;  // keys: queries that see some of the tile by their ranges lie within
  int begin;                    // tiles of columns that some row sees: [begin, end)
  int end;
  KeyInterval whole;          // columns that every row of the tile sees, or is seen by
  const void* stream_first;   // what streams by, from row 0 of the sequence on: Q of query head 0, or K
  const void* stream_second;  // likewise dO, or V
  const float* lse;           // of the sequence's queries, head 0
  const float* delta;
  int first_head;  // query heads [first_head, first_head + heads) stream by, one after the other
  int heads;
};

// One of the two kernels of a row.
//
// A warp owns whole 16-row tiles of its row group. With keys it has one of two roles: P and dV of its rows, or dP, dS
// and dK. Each has registers for 32 rows of one gradient, so that every fragment of what streams by serves twice as
// many products as with 16 rows of both.
template <class Element_, Side kSide_, int kHeadDim_, int kRows_, int kCols_, int kWarpsR_, int kWarpsC_, int kStages_,
          int kMinBlocks_>
struct SideTraits {
  using Element = Element_;
  static constexpr Side kSide = kSide_;
  static constexpr bool kKeys = kSide == Side::kKeys;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kWarpsR = kWarpsR_;
  static constexpr int kWarpsC = kWarpsC_;
  static constexpr int kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;

  static constexpr bool kFused = false;
  static constexpr int kRoles = kKeys ? 2 : 1;
  static constexpr int kThreads = 32 * kWarpsR * kWarpsC * kRoles;
  static constexpr int kTileCols = round_up(kHeadDim, 64);  // columns of head_dim in shared memory

  // S and dP: warp (r, c) owns kRowTiles x 16 rows and kColTiles x 8 columns.
  static constexpr int kRowsPerWarp = kRows / kWarpsR;
  static constexpr int kRowTiles = kRowsPerWarp / 16;
  static constexpr int kColsPerWarp = kCols / kWarpsC;
  static constexpr int kColTiles = kColsPerWarp / 8;

  // Gradients: it owns the same rows and kOutTiles x 8 columns of head_dim, kOutTilesPerSubtile of each 64.
  static constexpr int kOutTiles = kHeadDim / kWarpsC / 8;
  static constexpr int kOutTilesPerSubtile = 8 / kWarpsC;

  // Fragments of Q and dO stay in registers where they fit.
  static constexpr bool kRowsInRegisters = !kKeys && kHeadDim <= 64;
  // With one stage K and V of a step are refilled apart, each under the products of the other.
  static constexpr bool kRefillsApart = !kKeys && kStages == 1;

  // P and dS stay in registers as A operands when a warp owns whole rows of S. Else its row group shares their
  // fragments. The roles hand P over in the same way.
  static constexpr bool kShares = kWarpsC > 1;
  static constexpr int kFragmentSets = kRoles == 2 ? (kShares ? 2 : 1) : (kShares ? 1 : 0);

  static_assert(kRowsPerWarp % 16 == 0 && kColsPerWarp % 8 == 0 && kCols % 16 == 0);
  static_assert(kColTiles % 2 == 0 || (kColTiles == 1 && kShares && kHeadDim % 32 == 0));
  static_assert(kHeadDim % 16 == 0 && (kWarpsC == 1 || kHeadDim % 64 == 0) && 8 % (2 * kWarpsC) == 0);
  static_assert((kKeys ? kCols : kRows) <= kThreads && (kStages == 1 || kStages == 2));
  static_assert(3 * kWarpsR < 16 || kFragmentSets == 0, "three named barriers a row group");

  struct SharedStorage {
    alignas(1024) Element first[kRows * kTileCols];                   // K, or Q
    alignas(1024) Element second[kRows * kTileCols];                  // V, or dO
    alignas(1024) Element stream_first[kStages][kCols * kTileCols];   // Q, or K
    alignas(1024) Element stream_second[kStages][kCols * kTileCols];  // dO, or V
    // A operands, each of 16 rows and 16 columns as the 32 lanes hold it. Roles: P (shared alone), behind it what the
    // first role hands over, which becomes dS. One role: dS.
    alignas(16) uint4 fragments[kFragmentSets > 0 ? kFragmentSets * (kRows / 16) * (kCols / 16) * 32 : 1];
    alignas(16) float lse[kKeys ? kStages : 1][kKeys ? kCols : kRows];    // of the queries
    alignas(16) float delta[kKeys ? kStages : 1][kKeys ? kCols : kRows];  // likewise: D
    BackwardState state;
  };
};

template <class Element_, int kHeadDim_, int kKeyRows, int kKeyCols, int kKeyWarpsR, int kKeyWarpsC, int kKeyStages,
          int kKeyMinBlocks, int kQueryRows, int kQueryCols, int kQueryWarpsR, int kQueryWarpsC, int kQueryStages,
          int kQueryMinBlocks, int kSmemLimit>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  using Keys =
      SideTraits<Element, Side::kKeys, kHeadDim, kKeyRows, kKeyCols, kKeyWarpsR, kKeyWarpsC, kKeyStages, kKeyMinBlocks>;
  using Queries = SideTraits<Element, Side::kQueries, kHeadDim, kQueryRows, kQueryCols, kQueryWarpsR, kQueryWarpsC,
                             kQueryStages, kQueryMinBlocks>;
  // The larger one: what a row needs.
  using SharedStorage =
      std::conditional_t<(sizeof(typename Keys::SharedStorage) > sizeof(typename Queries::SharedStorage)),
                         typename Keys::SharedStorage, typename Queries::SharedStorage>;
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tile does not fit the shared memory its row promises");
};

// The kernel that keeps keys and gives all three gradients: dQ of a step goes to fp32 sums in global memory.
template <class Element_, int kHeadDim_, int kRows_, int kCols_, int kWarpsR_, int kWarpsC_, int kStages_,
          int kMinBlocks_>
struct FusedSide
    : SideTraits<Element_, Side::kKeys, kHeadDim_, kRows_, kCols_, kWarpsR_, kWarpsC_, kStages_, kMinBlocks_> {
  using Base = SideTraits<Element_, Side::kKeys, kHeadDim_, kRows_, kCols_, kWarpsR_, kWarpsC_, kStages_, kMinBlocks_>;
  using Element = Element_;
  static constexpr bool kFused = true;

  // dQ of a step: warp (r, c) owns 32 queries, or 16 where the columns of head_dim cannot be divided otherwise.
  static constexpr int kWarps = Base::kThreads / 32;
  static constexpr int kDqRowTiles = kCols_ >= 64 && kHeadDim_ % (16 * kWarps * 32 / kCols_) == 0 ? 2 : 1;
  static constexpr int kDqWarpsR = kCols_ / 16 / kDqRowTiles;
  static constexpr int kDqWarpsC = kWarps / kDqWarpsR;
  static constexpr int kDqColTiles = kHeadDim_ / kDqWarpsC / 8;
  static_assert(kWarps % kDqWarpsR == 0 && kHeadDim_ % (16 * kDqWarpsC) == 0);
  // A type of its own for each row: with one name in units for several architectures, nvcc before 13.0 would link the
  // finishing kernel of one of them, whichever device it is for.
  struct DqSums : RowMajorDqSums<(kCols_ > 64 ? kCols_ : 64), Base::kTileCols> {};

  // dS of a step, 16 keys after the other: of the columns of a warp subtiles of up to 64 queries, rows of kDsUnits
  // units of 16 bytes, which are swizzled. What a warp stores of 16 keys is one piece, where its P was before.
  static constexpr int kDsUnits = (Base::kColsPerWarp < 64 ? Base::kColsPerWarp : 64) / 8;
  static_assert(kDsUnits == 4 || kDsUnits == 8);

  struct SharedStorage {
    alignas(1024) Element first[kRows_ * Base::kTileCols];                    // K
    alignas(1024) Element second[kRows_ * Base::kTileCols];                   // V
    alignas(1024) Element stream_first[kStages_][kCols_ * Base::kTileCols];   // Q
    alignas(1024) Element stream_second[kStages_][kCols_ * Base::kTileCols];  // dO
    // A buffer for a step and one for the step before: what the first role hands over, as `fragments` of SideTraits,
    // then dS.
    alignas(1024) Element ds[2][kRows_ * kCols_];
    alignas(16) uint4 shared_p[Base::kShares ? kRows_ / 16 * (kCols_ / 16) * 32 : 1];
    alignas(16) float lse[kStages_][kCols_];
    alignas(16) float delta[kStages_][kCols_];
    alignas(8) QueryInterval seen[kRows_];  // the queries that see each key; none where it does not exist
    float* dq_sums;                         // of the sequence and query head 0
    BackwardState state;
  };
};

template <class Element_, int kHeadDim_, int kRows, int kCols, int kWarpsR, int kWarpsC, int kStages, int kMinBlocks,
          int kSmemLimit>
struct FusedBackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  using Keys = FusedSide<Element, kHeadDim, kRows, kCols, kWarpsR, kWarpsC, kStages, kMinBlocks>;
  using SharedStorage = typename Keys::SharedStorage;
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm80
