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

#include "common/attention_mask.h"
#include "common/kv_source.h"
#include "common/math.h"
#include "common/score.h"
#include "common/seqlen_info.h"
#include "mma_sync/atoms.h"

namespace broadhead::sm80 {

enum class Side { kQueries, kKeys };

// What all threads of a CTA know of its work.
struct BackwardState {
  SeqlenInfo seqlen;
  AttentionMask mask;
  ScoreScale scale;
  int head;       // query head, or KV head where keys are kept
  int first_row;  // of the tile within the sequence
  int end_row;    // the sequence's rows of this side
  LiveKeys rows;  // the rows of this side that the sequence has
  LiveKeys cols;  // columns that some row of the tile sees, or is seen by
  int begin;      // tiles of columns that some row sees: [begin, end)
  int end;
  int first_head;  // query heads [first_head, first_head + heads) stream by, one after the other
  int heads;
};

template <class Element_, int kHeadDim_, int kRows_, int kCols_, int kWarpsR_, int kWarpsC_, int kStages_,
          int kMinBlocks_, int kSmemLimit_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kWarpsR = kWarpsR_;
  static constexpr int kWarpsC = kWarpsC_;
  static constexpr int kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kSmemLimit = kSmemLimit_;

  static constexpr int kThreads = 32 * kWarpsR * kWarpsC;
  static constexpr int kTileCols = round_up(kHeadDim, 64);  // columns of head_dim in shared memory

  // S and dP: warp (r, c) owns kRowTiles x 16 rows and kColTiles x 8 columns.
  static constexpr int kRowsPerWarp = kRows / kWarpsR;
  static constexpr int kRowTiles = kRowsPerWarp / 16;
  static constexpr int kColsPerWarp = kCols / kWarpsC;
  static constexpr int kColTiles = kColsPerWarp / 8;

  // Gradients: it owns the same rows and kOutCols columns of head_dim.
  static constexpr int kOutCols = kHeadDim / kWarpsC;
  static constexpr int kOutTiles = kOutCols / 8;

  // P and dS stay in registers when a warp owns whole rows of S, else its row group exchanges them.
  static constexpr bool kExchange = kWarpsC > 1;
  static constexpr int kExchangeCols = round_up(2 * kCols, 64);

  static_assert(kRowsPerWarp % 16 == 0 && kColsPerWarp % 8 == 0 && kOutCols % 16 == 0 && kCols % 16 == 0);
  static_assert(kColTiles % 2 == 0 || kColTiles == 1);
  static_assert(kHeadDim % 16 == 0 && kCols <= kThreads && (kStages == 1 || kStages == 2));

  struct SharedStorage {
    alignas(1024) Element first[kRows * kTileCols];                         // K, or Q
    alignas(1024) Element second[kRows * kTileCols];                        // V, or dO
    alignas(1024) Element stream_first[kStages][kCols * kTileCols];         // Q, or K
    alignas(1024) Element stream_second[kStages][kCols * kTileCols];        // dO, or V
    alignas(1024) Element exchange[kExchange ? kRows * kExchangeCols : 8];  // P (keys alone), behind it dS
    alignas(16) float2 stats[kStages][kCols];  // of the queries that stream by: LSE in units of log2(e), D
    BackwardState state;
  };
  static_assert(sizeof(SharedStorage) <= kSmemLimit, "the tile does not fit the shared memory its row promises");
};

}  // namespace broadhead::sm80
