// After a fused Hopper backward kernel: dQ from its fp32 sums.
#pragma once

#include "sm90/backward/epilogue.h"
#include "sm90/backward/load.h"

namespace broadhead::sm90 {

// A CTA: 64 queries of a head. Threads stand for those of the two consumer warpgroups, whose accumulators the sums are.
template <class Traits>
__global__ void __launch_bounds__(128 * Traits::kConsumers)
    finish_dq(const __grid_constant__ AttnBwdParams params, const float4* sums, std::int64_t dq_tiles) {
  using Element = typename Traits::Element;
  const int head = blockIdx.y, batch = blockIdx.z;
  SeqlenInfo seqlen;
  locate_queries(params, batch, seqlen);
  const int first_row = blockIdx.x * 64;
  if (first_row >= seqlen.seqlen_q) return;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const std::int64_t tile = head * dq_tiles + first_dq_tile(params, seqlen, batch) + blockIdx.x;
  const float4* of_tile = sums + (tile * Traits::kConsumers + warpgroup) * (Traits::kDqTiles * 128) + thread;
  float dq[Traits::kDqTiles][4];
  BROADHEAD_UNROLL
  for (int n = 0; n < Traits::kDqTiles; ++n) {
    const float4 x = of_tile[n * 128];
    dq[n][0] = x.x, dq[n][1] = x.y, dq[n][2] = x.z, dq[n][3] = x.w;
  }
  const int first_col = warpgroup * Traits::kDqCols;
  write_gradient(dq, params.softmax_scale,
                 gradient_rows<Element>(static_cast<Element*>(params.dq) + first_col, params.dq_strides, seqlen.batch_q,
                                        seqlen.row_q, head, seqlen.seqlen_q, params.head_dim - first_col),
                 first_row + thread / 32 * 16 + thread % 32 / 4, {true, true});
}

}  // namespace broadhead::sm90
