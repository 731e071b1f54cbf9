// The end of an item: merges the results of the key groups and writes out and the LSE, or the partial results of a
// split.
#pragma once

#include "common/accumulator.h"
#include "common/online_softmax.h"
#include "common/row_result.h"
#include "decode/gemm.h"

namespace broadhead::decode {

// Converts two columns of O to the dtype of out.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t pack_out(const DecodeParams& params, float lo, float hi) {
  if constexpr (Traits::k8Bit) {
    if (params.q_dtype != DataType::kFloat16) return pack_pair<cutlass::bfloat16_t>(lo, hi);
  }
  return pack_pair<typename Traits::Element>(lo, hi);
}

// Merges the softmax state of a row over the key groups: returns the factor for the O of group `group`, and the LSE.
// Each of the four lanes of a row reads a quarter of the groups. All lanes of a warp call this.
template <class Traits>
BROADHEAD_DEVICE RowResult merge_row(const DecodeParams& params, const typename Traits::SharedStorage& smem,
                                     const ScoreScale& scale, bool is_split, int group, int row) {
  constexpr int kEach = ceil_div(Traits::kKeyGroups, 4);
  const int quarter = threadIdx.x % 4;
  float2 stats[kEach];
  float largest = -INFINITY;
  BROADHEAD_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int g = quarter + 4 * i;
    stats[i] = g < Traits::kKeyGroups ? smem.stats[g][row] : make_float2(-INFINITY, 0.f);
    largest = fmaxf(largest, stats[i].x);
  }
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  float factor = 0.f;
  float sum = 0.f;
  BROADHEAD_UNROLL
  for (int i = 0; i < kEach; ++i) {
    // A group without a visible key has sum 0. If its sum is not 0, its scores are NaN, which must not be lost.
    const float own = stats[i].x == -INFINITY ? (stats[i].y == 0.f ? 0.f : 1.f)
                                              : exp2_approx((stats[i].x - largest) * scale.scale_log2);
    sum += stats[i].y * own;
    if (quarter + 4 * i == group) factor = own;
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  factor = __shfl_sync(0xffffffffu, factor, threadIdx.x % 32 / 4 * 4 + group % 4);
  const RowPlace place{smem.rows[row].head >= 0, smem.rows[row].head, 0};
  const auto finish = [&](auto element) {
    return finish_row<decltype(element)>(params, place, {largest, sum}, scale, is_split ? 0 : -1);
  };
  const bool out_is_bf16 = Traits::k8Bit && params.q_dtype != DataType::kFloat16;
  RowResult result = out_is_bf16 ? finish(cutlass::bfloat16_t{}) : finish(typename Traits::Element{});
  result.inverse *= factor;
  if constexpr (Traits::k8Bit) result.inverse *= scale.v_factor;
  return result;
}

// Merges O over the key groups and writes the item's result. All threads call this behind the item's last product. The
// warps exchange O through the shared memory of Q.
template <class Traits>
BROADHEAD_DEVICE void write_item(const DecodeParams& params, const WorkItem& item, typename Traits::SharedStorage& smem,
                                 const float (&o)[Traits::kMmaM][Traits::kOTiles][4],
                                 OnlineSoftmax<2 * Traits::kMmaM>& softmax) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = Traits::key_group(warp);
  const int col_group = Traits::col_group(warp);
  softmax.reduce_sum();
  if (col_group == 0 && lane % 4 == 0) {
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
      const int row = accumulator_row(i, lane);
      smem.stats[group][row] = make_float2(softmax.row_max[i], softmax.row_sum[i]);
    }
  }
  __syncthreads();
  const bool is_split = item.is_split != 0;
  const ScoreScale scale = smem.tile.scale;
  float factor[2 * Traits::kMmaM];
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
    const int row = accumulator_row(i, lane);
    const RowResult result = merge_row<Traits>(params, smem, scale, is_split, group, row);
    factor[i] = result.inverse;
    float* lse = smem.rows[row].lse;
    if (warp == 0 && lane % 4 == 0 && lse != nullptr) *lse = result.lse;
    compile_barrier();  // one row at a time, since O leaves few registers
  }

  constexpr int kTilesPerPass = Traits::kMergeCols / 8;
  BROADHEAD_UNROLL
  for (int pass = 0; pass < Traits::kCols / Traits::kMergeCols; ++pass) {
    if (pass > 0) __syncthreads();  // the previous columns are written
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
      const int row = accumulator_row(i, lane);
      float* target = smem.merge[warp][row];
      BROADHEAD_UNROLL
      for (int t = 0; t < kTilesPerPass; t += Traits::k8Bit ? 2 : 1) {
        const float* tile = &o[i / 2][pass * kTilesPerPass + t][i % 2 * 2];
        if constexpr (Traits::k8Bit) {
          const float* odd = &o[i / 2][pass * kTilesPerPass + t + 1][i % 2 * 2];
          *reinterpret_cast<float4*>(target + o_column<Traits>(t, 0, lane)) =
              make_float4(tile[0] * factor[i], odd[0] * factor[i], tile[1] * factor[i], odd[1] * factor[i]);
        } else {
          *reinterpret_cast<float2*>(target + o_column<Traits>(t, 0, lane)) =
              make_float2(tile[0] * factor[i], tile[1] * factor[i]);
        }
      }
    }
    __syncthreads();
    // The threads of a column group sum over the key groups, four columns each.
    constexpr int kQuads = Traits::kMergeCols / 4;
    for (int index = group * 32 + lane; index < Traits::kTileM * kQuads; index += Traits::kKeyGroups * 32) {
      const int row = index / kQuads;
      const int quad = index % kQuads * 4;
      const int col = col_group * Traits::kCols + pass * Traits::kMergeCols + quad;
      void* target = smem.rows[row].out;
      if (target == nullptr || col >= params.head_dim_v) continue;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      BROADHEAD_UNROLL
      for (int g = 0; g < Traits::kKeyGroups; ++g) {
        const float4 x = *reinterpret_cast<const float4*>(&smem.merge[Traits::warp_of(g, col_group)][row][quad]);
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
      }
      if (is_split) {
        *reinterpret_cast<float4*>(static_cast<float*>(target) + col) = sum;
      } else {
        *reinterpret_cast<uint2*>(static_cast<Element*>(target) + col) =
            make_uint2(pack_out<Traits>(params, sum.x, sum.y), pack_out<Traits>(params, sum.z, sum.w));
      }
    }
  }
}

}  // namespace broadhead::decode
