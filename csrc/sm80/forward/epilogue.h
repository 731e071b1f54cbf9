// Writes a tile's result: the final output with its LSE, or a split's partial output and partial LSE.
#pragma once

#include "common/online_softmax.h"
#include "common/quad.h"
#include "common/row_result.h"
#include "sm80/forward/mainloop.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// All warps of the CTA call this. `split` < 0 means the final output.
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

  RowPlace places[kRows];
  float inverse[kRows];
  BROADHEAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
    places[i] = place_row(output, row);
    const RowResult result =
        finish_row<Element>(params, places[i], {softmax.row_max[i], softmax.row_sum[i]}, scale, split);
    inverse[i] = result.inverse;
    if (warp_n == 0 && lane % 4 == 0) write_lse(params, seqlen, places[i], result.lse, split);
  }

  if (split >= 0) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!places[i].live || inverse[i] == 0.f) continue;  // an empty split writes its LSE alone
      float* target = partial_row(params, seqlen, places[i], split);
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

  const int quad = lane % 4;
  BROADHEAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    Element* target = output_row<Element>(params, seqlen, places[i]);
    const int c = (i % 2) * 2;
    static_assert(Traits::kOTiles % 4 == 0);
    BROADHEAD_UNROLL
    for (int t = 0; t < Traits::kOTiles; t += 4) {
      std::uint32_t words[4];
      BROADHEAD_UNROLL
      for (int u = 0; u < 4; ++u) {
        const auto& tile = o[i / 2][t + u];
        words[u] = pack_pair<Element>(tile[c] * inverse[i], tile[c + 1] * inverse[i]);
      }
      const uint4 value = transpose_quad(words);
      // Pairs of tiles are neighbours.
      const int col = (quad < 2 ? o_column<Traits>(t, warp_n) : o_column<Traits>(t + 2, warp_n)) + quad % 2 * 8;
      if (places[i].live && col < params.head_dim_v) *reinterpret_cast<uint4*>(target + col) = value;
    }
  }
}

}  // namespace broadhead::sm80
