// Writes a tile's result: the final output with its LSE, or a split's partial output and partial LSE.
#pragma once

#include "common/online_softmax.h"
#include "common/quad.h"
#include "common/row_result.h"
#include "sm80/forward/mainloop.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// Stores O from registers: lanes of a quad exchange words, so that each stores 16 bytes of a row. Of a tile whose warps
// have 16 rows each.
template <class Traits>
BROADHEAD_DEVICE void store_from_registers(const AttnParams& params, const SeqlenInfo& seqlen, const OutputRows& output,
                                           const float (&o)[Traits::kMmaM][Traits::kOTiles][4],
                                           const float (&inverse)[2 * Traits::kMmaM], int warp_m, int warp_n,
                                           int lane) {
  using Element = typename Traits::Element;
  static_assert(Traits::kMmaM == 1 && Traits::kOTiles % 4 == 0);
  const int quad = lane % 4;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2; ++i) {
    const RowPlace place = place_row(output, warp_m * Traits::kRowsPerWarp + i * 8 + lane / 4);
    Element* target = output_row<Element>(params, seqlen, place);
    BROADHEAD_UNROLL
    for (int t = 0; t < Traits::kOTiles; t += 4) {
      std::uint32_t words[4];
      BROADHEAD_UNROLL
      for (int u = 0; u < 4; ++u) {
        words[u] = pack_pair<Element>(o[0][t + u][2 * i] * inverse[i], o[0][t + u][2 * i + 1] * inverse[i]);
      }
      const uint4 value = transpose_quad(words, quad);
      // Pairs of tiles are neighbours.
      const int col = (quad < 2 ? o_column<Traits>(t, warp_n) : o_column<Traits>(t + 2, warp_n)) + quad % 2 * 8;
      if (place.live && col < params.head_dim_v) *reinterpret_cast<uint4*>(target + col) = value;
    }
  }
}

// Stores O through the shared memory of Q, so that every global store is 16 bytes of a row, and neighbours are of one.
template <class Traits>
BROADHEAD_DEVICE void store_through_shared(const AttnParams& params, typename Traits::SharedStorage& smem,
                                           const SeqlenInfo& seqlen, const OutputRows& output,
                                           const float (&o)[Traits::kMmaM][Traits::kOTiles][4],
                                           const float (&inverse)[2 * Traits::kMmaM], int warp_m, int warp_n,
                                           int lane) {
  using Element = typename Traits::Element;
  constexpr int kRows = 2 * Traits::kMmaM;
  char* base = reinterpret_cast<char*>(smem.q);
  BROADHEAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
    BROADHEAD_UNROLL
    for (int tile = 0; tile < Traits::kOTiles; ++tile) {
      const int col = o_column<Traits>(tile, warp_n);
      const int unit = (col / 8) % 8 ^ (row & 7);
      const int c = (i % 2) * 2;
      *reinterpret_cast<std::uint32_t*>(base + (col / 64) * (Traits::kTileM * 128) + row * 128 + unit * 16 +
                                        (lane % 4) * 4) =
          pack_pair<Element>(o[i / 2][tile][c] * inverse[i], o[i / 2][tile][c + 1] * inverse[i]);
    }
  }
  __syncthreads();
  constexpr int kUnits = Traits::kQCols / 8;
  for (int index = threadIdx.x; index < Traits::kTileM * kUnits; index += Traits::kThreads) {
    const int row = index / kUnits;
    const int unit = index % kUnits;
    if (!output.live(row) || unit * 8 >= params.head_dim_v) continue;
    const uint4 value = *reinterpret_cast<const uint4*>(base + (unit / 8) * (Traits::kTileM * 128) + row * 128 +
                                                        ((unit % 8) ^ (row & 7)) * 16);
    Element* target = output_row<Element>(params, seqlen, place_row(output, row));
    *reinterpret_cast<uint4*>(target + unit * 8) = value;
  }
}

// All threads of the CTA call this after their last use of shared memory. `split` < 0 means the final output.
template <class Traits>
BROADHEAD_DEVICE void write_tile(const AttnParams& params, typename Traits::SharedStorage& smem,
                                 float (&o)[Traits::kMmaM][Traits::kOTiles][4],
                                 OnlineSoftmax<2 * Traits::kMmaM>& softmax, const ScoreScale& scale, int split,
                                 int warp_m, int warp_n, int lane) {
  using Element = typename Traits::Element;
  const SeqlenInfo seqlen = smem.state.seqlen;
  const OutputRows output = smem.state.output;
  constexpr int kRows = 2 * Traits::kMmaM;
  softmax.reduce_sum();
  if constexpr (Traits::kSharedP) {
    // The keys of a row are divided among kWarpsN warps, so their sums are added.
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
      if (lane % 4 == 0) smem.row_stats[warp_n * Traits::kTileM + row] = softmax.row_sum[i];
    }
    __syncthreads();
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
      float sum = 0.f;
      BROADHEAD_UNROLL
      for (int w = 0; w < Traits::kWarpsN; ++w) sum += smem.row_stats[w * Traits::kTileM + row];
      softmax.row_sum[i] = sum;
    }
  }

  float inverse[kRows];
  BROADHEAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
    const RowPlace place = place_row(output, row);
    const RowResult result = finish_row<Element>(params, place, {softmax.row_max[i], softmax.row_sum[i]}, scale, split);
    inverse[i] = result.inverse;
    if (warp_n == 0 && lane % 4 == 0) write_lse(params, seqlen, place, result.lse, split);
  }

  if (split >= 0) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
      if (!output.live(row) || inverse[i] == 0.f) continue;  // an empty split writes its LSE alone
      float* target = partial_row(params, seqlen, place_row(output, row), split);
      BROADHEAD_UNROLL
      for (int tile = 0; tile < Traits::kOTiles; ++tile) {
        const int col = o_column<Traits>(tile, warp_n) + (lane % 4) * 2;
        if (col < params.head_dim_v) {
          const int c = (i % 2) * 2;
          *reinterpret_cast<float2*>(target + col) =
              make_float2(o[i / 2][tile][c] * inverse[i], o[i / 2][tile][c + 1] * inverse[i]);
        }
      }
    }
    return;
  }

  // PERF(H200): the way through shared memory took 3,200 of the 11,000 cycles of a tile that has one n_block.
  if constexpr (Traits::kMmaM == 1) {
    store_from_registers<Traits>(params, seqlen, output, o, inverse, warp_m, warp_n, lane);
  } else {
    store_through_shared<Traits>(params, smem, seqlen, output, o, inverse, warp_m, warp_n, lane);
  }
}

}  // namespace broadhead::sm80
