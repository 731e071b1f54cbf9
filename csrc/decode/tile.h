// A tile's beginning and end: Q into shared memory; the key groups' results merged and written.
#pragma once

#include <cutlass/arch/memory.h>
#include <cute/arch/copy.hpp>

#include "common/accumulator.h"
#include "common/online_softmax.h"
#include "common/row_result.h"
#include "decode/gemm.h"
#include "decode/rows.h"
#include "decode/workspace.h"

namespace broadhead::decode {

// One thread fills the block's tile.
template <class Traits>
BROADHEAD_DEVICE void set_tile(const DecodeParams& params, const LineItem& item, DecodeTile& tile) {
  const SeqlenInfo& seqlen = item.seqlen;
  const RowMap rows = tile_rows<Traits::kTileM>(params, seqlen, item.batch, item.m_block);
  tile.rows = rows;
  tile.mask = make_mask(params, seqlen, item.batch);
  tile.unmasked = params.sees_all ? KeyInterval{0, seqlen.seqlen_k}
                  : seqlen.seqlen_q == 1
                      ? tile.mask.unmasked_interval(0, 0)
                      : tile.mask.unmasked_interval(rows.token(0), rows.token(rows.end_row - rows.first_row - 1));
  float scale = params.softmax_scale;
  if constexpr (Traits::k8Bit) {
    const int kv_head = kv_head_of(params, item);
    const int batch = is_shared(params, item.batch) ? 0 : item.batch;
    scale *= descale(params.q_descale, params.q_descale_strides, batch, kv_head) *
             descale(params.k_descale, params.k_descale_strides, batch, kv_head);
    tile.scale.v_factor = descale(params.v_descale, params.v_descale_strides, batch, kv_head);
  }
  tile.scale.set(scale, params.softcap);
}

// A thread below kTileM: where its row goes when the tile is done.
template <class Traits>
BROADHEAD_DEVICE void set_row(const DecodeParams& params, const Workspace& workspace, const LineItem& item, int row,
                              DecodeRow& target) {
  const RowPlace place =
      place_row({tile_rows<Traits::kTileM>(params, item.seqlen, item.batch, item.m_block), item.head}, row);
  target = {nullptr, nullptr, -1};
  if (!place.live) return;
  target.head = place.head;
  if (item.is_part) {
    const long long slot = workspace.slot(params, item, blockIdx.x);
    target.out = workspace.out_row(params, slot, row);
    target.lse = workspace.lse_row(slot, row);
  } else {
    target.out = output_row<typename Traits::Element>(params, item.seqlen, place);  // any 16-bit dtype
    target.lse = lse_address(params, item.seqlen, place);
  }
}

// Where a row of the item's tile lies in q, or kQv: in qv, in elements; -1: past the sequence.
template <class Traits, bool kQv>
BROADHEAD_DEVICE std::int64_t q_row_offset(const DecodeParams& params, const LineItem& item, int tile_row) {
  const SeqlenInfo& seqlen = item.seqlen;
  const int per_token = params.rows_per_token;
  const int row = item.m_block * Traits::kTileM + tile_row;
  if (row >= sequence_rows(params, seqlen, item.batch)) return -1;
  const int token = per_token == 1 ? row : seqlen.seqlen_q == 1 ? 0 : row / per_token;
  const int head = item.head * per_token + row - token * per_token;
  const TensorStrides& strides = kQv ? params.qv_strides : params.q_strides;
  return seqlen.batch_q * strides.batch + (seqlen.row_q + token) * strides.row + head * strides.head;
}

// Asks the L2 for the item's rows of q, or kQv: of qv.
template <class Traits, bool kQv>
BROADHEAD_DEVICE void prefetch_rows(const DecodeParams& params, const LineItem& item) {
  constexpr int kLineElements = 64;
  constexpr int kLines = (kQv ? Traits::kHeadDim : Traits::kHeadDimK) / kLineElements;
  for (int index = threadIdx.x; index < Traits::kTileM * kLines; index += Traits::kThreads) {
    const std::int64_t offset = q_row_offset<Traits, kQv>(params, item, index / kLines);
    const int col = index % kLines * kLineElements;
    if (offset < 0 || col >= (kQv ? params.head_dim_v : params.head_dim)) continue;
    const int size = Traits::k8Bit && params.q_dtype == DataType::kFloat8E4M3 ? 1 : 2;
    cute::prefetch(static_cast<const char*>(kQv ? params.qv : params.q) + (offset + col) * size);
  }
}

// The same for all query rows: when their turn comes, the memory is busy with K and V. Each warp a share.
template <class Traits>
BROADHEAD_DEVICE void prefetch_q(const DecodeParams& params, const LineItem& item) {
  if constexpr (Traits::kWithQv) prefetch_rows<Traits, true>(params, item);
  prefetch_rows<Traits, false>(params, item);
}

// A thread's share of Q on its way from global to shared memory, eight columns of a row at a time.
template <class Traits>
struct QTile {
  static constexpr int kUnits = Traits::kQCols / 8;  // in a row
  static constexpr int kEach = ceil_div(Traits::kTileM * kUnits, Traits::kThreads);
  // Q is read while nothing else needs registers; a large tile is copied a piece at a time.
  static constexpr bool kInRegisters = kEach <= 5 && Traits::kTileM == 16;
  uint4 values[kInRegisters ? kEach : 1];

  BROADHEAD_DEVICE void read(const DecodeParams& params, const LineItem& item) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kEach; ++i) values[i] = read_unit(params, item, i);
  }

  // What Q is multiplied by: fp16 must hold it. All threads, with a barrier.
  BROADHEAD_DEVICE float find_scale(const DecodeParams& params, const LineItem& item,
                                    typename Traits::SharedStorage& smem) const {
    if constexpr (!Traits::k8Bit) return 1.f;
    if (params.q_dtype != DataType::kBFloat16) return 1.f;
    unsigned largest = 0;  // bits of a bf16, without its sign
#pragma unroll kInRegisters ? kEach : 1
    for (int i = 0; i < kEach; ++i) {
      const uint4 value = kInRegisters ? values[kInRegisters ? i : 0] : read_unit(params, item, i);
      for (const unsigned word : {value.x, value.y, value.z, value.w}) {
        // Infinities and NaN stay what they are and must not push the other rows out of range.
        for (const unsigned bits : {word & 0x7fffu, (word >> 16) & 0x7fffu}) {
          if (bits < 0x7f80u) largest = max(largest, bits);
        }
      }
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) smem.q_largest[threadIdx.x / 32] = largest;
    __syncthreads();
    BROADHEAD_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) largest = max(largest, smem.q_largest[w]);
    // The largest number of the tile comes to lie in [2^14, 2^15).
    const int exponent = static_cast<int>(largest >> 7) - 127;
    return exp2f(static_cast<float>(14 - max_int(-100, min_int(100, exponent))));
  }

  BROADHEAD_DEVICE void store(const DecodeParams& params, float scale, typename Traits::SharedStorage& smem) const {
    BROADHEAD_UNROLL
    for (int i = 0; i < kEach; ++i) store_unit(params, smem, i, values[i], scale);
  }

  // read and store, a few registers at a time.
  BROADHEAD_DEVICE static void copy(const DecodeParams& params, const LineItem& item, float scale,
                                    typename Traits::SharedStorage& smem) {
#pragma unroll 2
    for (int i = 0; i < kEach; ++i) store_unit(params, smem, i, read_unit(params, item, i), scale);
  }

 private:
  // With qv the threads share all its units, then those of q: i alone tells which.
  static constexpr int kQvUnits = Traits::kWithQv ? Traits::kHeadDim / 8 : 0;  // in a row, in front of those of q
  static constexpr int kQvEach = Traits::kTileM * kQvUnits / Traits::kThreads;
  static constexpr int kOwnUnits = kUnits - kQvUnits;
  static_assert(Traits::kTileM * kQvUnits % Traits::kThreads == 0);

  BROADHEAD_DEVICE static int index_of(int i) { return threadIdx.x + i * Traits::kThreads; }

  BROADHEAD_DEVICE static uint4 read_unit(const DecodeParams& params, const LineItem& item, int i) {
    if constexpr (Traits::kWithQv) {
      if (i < kQvEach) return read_unit_of<true, kQvUnits>(params, item, index_of(i));
    }
    return read_unit_of<false, kOwnUnits>(params, item, index_of(i - kQvEach));
  }

  // A unit of q, or kQv: of qv, which has kOfRow units a row. Rows past the sequence and columns past head_dim become
  // zero.
  template <bool kQv, int kOfRow>
  BROADHEAD_DEVICE static uint4 read_unit_of(const DecodeParams& params, const LineItem& item, int index) {
    const int row = index / kOfRow, col = index % kOfRow * 8;
    if (row >= Traits::kTileM || col >= (kQv ? params.head_dim_v : params.head_dim)) return make_uint4(0, 0, 0, 0);
    const std::int64_t offset = q_row_offset<Traits, kQv>(params, item, row);
    if (offset < 0) return make_uint4(0, 0, 0, 0);
    // volatile: the compiler must not move the loads behind the copies of K and V. CUTLASS's are under a predicate.
    uint4 value = make_uint4(0, 0, 0, 0);
    if (Traits::k8Bit && params.q_dtype == DataType::kFloat8E4M3) {
      asm volatile("ld.global.v2.b32 {%0, %1}, [%2];"
                   : "=r"(value.x), "=r"(value.y)
                   : "l"(static_cast<const char*>(params.q) + offset + col));
    } else {
      asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                   : "l"(static_cast<const char*>(kQv ? params.qv : params.q) + (offset + col) * 2));
    }
    return value;
  }

  BROADHEAD_DEVICE static std::uint32_t scaled_half(std::uint32_t bf16_pair, float scale) {
    return pack_pair<cutlass::half_t>(__uint_as_float(bf16_pair << 16) * scale,
                                      __uint_as_float(bf16_pair & 0xffff0000u) * scale);
  }

  BROADHEAD_DEVICE static void store_unit(const DecodeParams& params, typename Traits::SharedStorage& smem, int i,
                                          uint4 value, float scale) {
    constexpr int kOfRow = Traits::kHeadDim / 8;  // units of qv
    const bool is_qv = i < kQvEach;
    const int index = index_of(is_qv ? i : i - kQvEach);
    const int row = is_qv ? index / kOfRow : index / kOwnUnits;
    const int unit = is_qv ? index % kOfRow : kQvUnits + index % kOwnUnits;
    if (Traits::kTileM * kUnits % Traits::kThreads != 0 && row >= Traits::kTileM) return;
    const std::uint32_t base = smem_address(smem.q);
    if constexpr (!Traits::k8Bit) {
      cutlass::arch::shared_store<16>(base + q_offset<Traits>(row, unit), &value);
      return;
    }
    if (params.q_dtype == DataType::kFloat8E4M3) {
      value = make_uint4(widen<0>(value.x), widen<1>(value.x), widen<0>(value.y), widen<1>(value.y));
    } else if (params.q_dtype == DataType::kBFloat16) {
      value = make_uint4(scaled_half(value.x, scale), scaled_half(value.y, scale), scaled_half(value.z, scale),
                         scaled_half(value.w, scale));
    }
    // A lane's four bytes of K are columns 4 t to 4 t + 3 of a step of 16, at its positions 2 t, 2 t + 1, 2 t + 8 and
    // 2 t + 9 (B fragments of m16n8k16): Q goes where they are.
    const int first = unit / 2 * 2;
    const std::uint32_t half = unit % 2 * 8;
    const uint2 low = make_uint2(value.x, value.z), high = make_uint2(value.y, value.w);
    cutlass::arch::shared_store<8>(base + q_offset<Traits>(row, first) + half, &low);
    cutlass::arch::shared_store<8>(base + q_offset<Traits>(row, first + 1) + half, &high);
  }
};

// Two columns of out.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t pack_out(const DecodeParams& params, float lo, float hi) {
  if constexpr (Traits::k8Bit) {
    if (params.q_dtype != DataType::kFloat16) return pack_pair<cutlass::bfloat16_t>(lo, hi);
  }
  return pack_pair<typename Traits::Element>(lo, hi);
}

// What a row's key groups make together: the factor of the O of group `group`, and the LSE. The four lanes of a row
// share the groups; all lanes of a warp call this.
template <class Traits>
BROADHEAD_DEVICE RowResult merge_row(const DecodeParams& params, const typename Traits::SharedStorage& smem,
                                     const ScoreScale& scale, bool is_part, int group, int row) {
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
    // A group without a visible key has sum 0 (or NaN scores, which must get through).
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
    return finish_row<decltype(element)>(params, place, {largest, sum}, scale, is_part ? 0 : -1);
  };
  const bool out_is_bf16 = Traits::k8Bit && params.q_dtype != DataType::kFloat16;
  RowResult result = out_is_bf16 ? finish(cutlass::bfloat16_t{}) : finish(typename Traits::Element{});
  result.inverse *= factor;
  if constexpr (Traits::k8Bit) result.inverse *= scale.v_factor;
  return result;
}

// All threads, behind the tile's last product. Shared memory of Q serves the exchange.
template <class Traits>
BROADHEAD_DEVICE void write_item(const DecodeParams& params, const LineItem& item, typename Traits::SharedStorage& smem,
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
  const bool is_part = item.is_part != 0;
  const ScoreScale scale = smem.tile.scale;
  float factor[2 * Traits::kMmaM];
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
    const int row = accumulator_row(i, lane);
    const RowResult result = merge_row<Traits>(params, smem, scale, is_part, group, row);
    factor[i] = result.inverse;
    float* lse = smem.rows[row].lse;
    if (warp == 0 && lane % 4 == 0 && lse != nullptr) *lse = result.lse;
    compile_barrier();  // a row at a time: O leaves few registers
  }

  constexpr int kTilesPerPass = Traits::kMergeCols / 8;
  BROADHEAD_UNROLL
  for (int pass = 0; pass < Traits::kCols / Traits::kMergeCols; ++pass) {
    if (pass > 0) __syncthreads();  // the columns before are out
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
    // The threads of a column group add up its key groups, four columns each.
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
      if (is_part) {
        *reinterpret_cast<float4*>(static_cast<float*>(target) + col) = sum;
      } else {
        *reinterpret_cast<uint2*>(static_cast<Element*>(target) + col) =
            make_uint2(pack_out<Traits>(params, sum.x, sum.y), pack_out<Traits>(params, sum.z, sum.w));
      }
    }
  }
}

}  // namespace broadhead::decode
