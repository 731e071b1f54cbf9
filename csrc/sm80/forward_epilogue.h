// Writes a tile's result: the final output with its LSE, or a split's partial output and partial LSE.
#pragma once

#include "common/online_softmax.h"
#include "sm80/forward_gemm.h"
#include "sm80/forward_score.h"

namespace broadhead {

BROADHEAD_DEVICE float load_sink(const AttnParams& params, const cutlass::bfloat16_t*, int head) {
  return params.sinks_are_fp32 ? static_cast<const float*>(params.sinks)[head]
                               : __bfloat162float(static_cast<const __nv_bfloat16*>(params.sinks)[head]);
}
BROADHEAD_DEVICE float load_sink(const AttnParams& params, const cutlass::half_t*, int head) {
  return params.sinks_are_fp32 ? static_cast<const float*>(params.sinks)[head]
                               : __half2float(static_cast<const __half*>(params.sinks)[head]);
}

// All threads of the block call this after their last use of shared memory. `split` < 0: final output.
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
    // A row's keys were dealt to kWarpsN warps: add their sums.
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
  const std::int64_t total_rows = params.total_q;
  BROADHEAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
    const bool live = output.live(row);
    const int head = output.query_head(row);
    const int token = output.rows.token(row);
    float sum = softmax.row_sum[i];
    // A row of NaN scores has no maximum either, but its sum is NaN.
    const bool empty = softmax.row_max[i] == -INFINITY && sum == 0.f;
    if (params.sinks != nullptr && split < 0 && live && !empty) {
      // The sink's term relative to the running reference; it is far out of range only when it dominates the row.
      const float sink = load_sink(params, static_cast<const Element*>(nullptr), head);
      const float reference = softmax.row_max[i] * scale.scale;
      if (sink - reference > 80.f) {  // exp would overflow fp32 against the sum: the row is all sink
        sum = INFINITY;
      } else {
        sum += exp2f((sink - reference) * kLog2e);
      }
      if (sum == INFINITY) softmax.row_max[i] = sink / scale.scale;
    }
    inverse[i] = empty ? 0.f : 1.f / sum;
    float lse = softmax.row_max[i] * scale.scale + (sum == INFINITY ? 0.f : logf(sum));
    if (empty) lse = -INFINITY;
    if (live && warp_n == 0 && lane % 4 == 0) {
      if (split < 0 && params.softmax_lse == nullptr) continue;
      if (split < 0) {
        params.softmax_lse[seqlen.batch_q * params.lse_batch_stride + head * params.lse_head_stride + seqlen.row_q +
                           token] = lse;
      } else {
        const std::int64_t r = seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q + token;
        params.lse_partial[(static_cast<std::int64_t>(split) * params.num_heads_q + head) * total_rows + r] = lse;
      }
    }
  }

  if (split >= 0) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = warp_m * Traits::kRowsPerWarp + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
      if (!output.live(row) || inverse[i] == 0.f) continue;  // an empty share is told by its LSE alone
      const std::int64_t r =
          seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q + output.rows.token(row);
      float* target =
          params.out_partial +
          ((static_cast<std::int64_t>(split) * params.num_heads_q + output.query_head(row)) * total_rows + r) *
              params.head_dim_v;
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

  // O goes through the shared memory of Q so that every global store is 16 bytes of a row.
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
          MmaAtom<Element>::pack(o[i / 2][tile][c] * inverse[i], o[i / 2][tile][c + 1] * inverse[i]);
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
    Element* target = static_cast<Element*>(params.out) + seqlen.batch_q * params.out_strides.batch +
                      (seqlen.row_q + output.rows.token(row)) * params.out_strides.row +
                      output.query_head(row) * params.out_strides.head;
    *reinterpret_cast<uint4*>(target + unit * 8) = value;
  }
}

}  // namespace broadhead
