// A tile's beginning and end: Q into shared memory; the key groups' results merged and written.
#pragma once

#include "common/online_softmax.h"
#include "common/row_result.h"
#include "decode/gemm.h"
#include "decode/workspace.h"

namespace broadhead::decode {

// One thread fills the block's tile.
template <class Traits>
BROADHEAD_DEVICE void set_tile(const AttnParams& params, const LineItem& item, float q_scale, DecodeTile& tile) {
  const SeqlenInfo seqlen = make_seqlen_info(params, item.batch);
  const int per_token = rows_per_token(params);
  const int first_row = item.m_block * Traits::kTileM;
  const int end_row = min_int(first_row + Traits::kTileM, seqlen.seqlen_q * per_token);
  tile.seqlen = seqlen;
  tile.output = {{first_row, per_token, end_row}, item.head};
  tile.mask = make_mask(params, seqlen, item.batch);
  const RowMap& rows = tile.output.rows;
  tile.unmasked = tile.mask.unmasked_interval(rows.token(0), rows.token(end_row - first_row - 1));
  const int kv_head = params.pack_gqa ? item.head : item.head / (params.num_heads_q / params.num_heads_kv);
  const auto descale = [&](const float* factors, const DescaleStrides& strides) {
    return factors == nullptr ? 1.f : factors[item.batch * strides.batch + kv_head * strides.head];
  };
  float scale = params.softmax_scale;
  if constexpr (Traits::k8Bit) {
    scale *= descale(params.q_descale, params.q_descale_strides) * descale(params.k_descale, params.k_descale_strides) /
             q_scale;
    tile.scale.v_factor = descale(params.v_descale, params.v_descale_strides);
  }
  tile.scale.set(scale, params.softcap);
}

// Where a row of the item's tile lies in q, in elements; -1: past the sequence.
template <class Traits>
BROADHEAD_DEVICE std::int64_t q_row_offset(const AttnParams& params, const LineItem& item, int tile_row) {
  const SeqlenInfo seqlen = make_seqlen_info(params, item.batch);
  const int per_token = rows_per_token(params);
  const int row = item.m_block * Traits::kTileM + tile_row;
  if (row >= seqlen.seqlen_q * per_token) return -1;
  const int token = per_token == 1 ? row : row / per_token;
  const int head = item.head * per_token + row - token * per_token;
  return seqlen.batch_q * params.q_strides.batch + (seqlen.row_q + token) * params.q_strides.row +
         head * params.q_strides.head;
}

// Asks the L2 for the item's query rows: when their turn comes, the memory is busy with K and V. Each warp a share.
template <class Traits>
BROADHEAD_DEVICE void prefetch_q(const AttnParams& params, const LineItem& item) {
  constexpr int kLineElements = 64;
  constexpr int kLines = Traits::kHeadDim / kLineElements;
  for (int index = threadIdx.x; index < Traits::kTileM * kLines; index += Traits::kThreads) {
    const std::int64_t offset = q_row_offset<Traits>(params, item, index / kLines);
    const int col = index % kLines * kLineElements;
    if (offset < 0 || col >= params.head_dim) continue;
    const int size = Traits::k8Bit && params.q_dtype == DataType::kFloat8E4M3 ? 1 : 2;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(params.q) + (offset + col) * size));
  }
}

// A thread's share of Q on its way from global to shared memory, eight columns of a row at a time.
template <class Traits>
struct QTile {
  static constexpr int kUnits = Traits::kHeadDim / 8;  // in a row
  static constexpr int kEach = ceil_div(Traits::kTileM * kUnits, Traits::kThreads);
  // Q is read while nothing else needs registers; a large tile is copied a piece at a time.
  static constexpr bool kInRegisters = kEach <= 4 && Traits::kTileM == 16;
  uint4 values[kInRegisters ? kEach : 1];

  BROADHEAD_DEVICE void read(const AttnParams& params, const LineItem& item) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kEach; ++i) values[i] = read_unit(params, item, i);
  }

  // What Q is multiplied by: fp16 must hold it. All threads, with a barrier.
  BROADHEAD_DEVICE float find_scale(const AttnParams& params, const LineItem& item,
                                    typename Traits::SharedStorage& smem) const {
    if constexpr (!Traits::k8Bit) return 1.f;
    if (params.q_dtype != DataType::kBFloat16) return 1.f;
    unsigned largest = 0;  // bits of a bf16, without its sign
#pragma unroll kInRegisters ? kEach : 1
    for (int i = 0; i < kEach; ++i) {
      const uint4 value = kInRegisters ? values[kInRegisters ? i : 0] : read_unit(params, item, i);
      for (const unsigned word : {value.x, value.y, value.z, value.w}) {
        largest = max(largest, max(word & 0x7fffu, (word >> 16) & 0x7fffu));
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

  BROADHEAD_DEVICE void store(const AttnParams& params, float scale, typename Traits::SharedStorage& smem) const {
    BROADHEAD_UNROLL
    for (int i = 0; i < kEach; ++i) store_unit(params, smem, i, values[i], scale);
  }

  // read and store, a few registers at a time.
  BROADHEAD_DEVICE static void copy(const AttnParams& params, const LineItem& item, float scale,
                                    typename Traits::SharedStorage& smem) {
#pragma unroll 2
    for (int i = 0; i < kEach; ++i) store_unit(params, smem, i, read_unit(params, item, i), scale);
  }

 private:
  BROADHEAD_DEVICE static int index_of(int i) { return threadIdx.x + i * Traits::kThreads; }

  // Rows past the sequence and columns past head_dim become zero.
  BROADHEAD_DEVICE static uint4 read_unit(const AttnParams& params, const LineItem& item, int i) {
    const int index = index_of(i);
    const int row = index / kUnits, col = index % kUnits * 8;
    if (row >= Traits::kTileM || col >= params.head_dim) return make_uint4(0, 0, 0, 0);
    const std::int64_t offset = q_row_offset<Traits>(params, item, row);
    if (offset < 0) return make_uint4(0, 0, 0, 0);
    if (Traits::k8Bit && params.q_dtype == DataType::kFloat8E4M3) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(static_cast<const char*>(params.q) + offset + col);
      return make_uint4(bytes.x, bytes.y, 0, 0);
    }
    return *reinterpret_cast<const uint4*>(static_cast<const char*>(params.q) + (offset + col) * 2);
  }

  BROADHEAD_DEVICE static std::uint32_t scaled_half(std::uint32_t bf16_pair, float scale) {
    return pack_pair<cutlass::half_t>(__uint_as_float(bf16_pair << 16) * scale,
                                      __uint_as_float(bf16_pair & 0xffff0000u) * scale);
  }

  BROADHEAD_DEVICE static void store_unit(const AttnParams& params, typename Traits::SharedStorage& smem, int i,
                                          uint4 value, float scale) {
    const int index = index_of(i);
    const int row = index / kUnits, unit = index % kUnits;
    if (Traits::kTileM * kUnits % Traits::kThreads != 0 && row >= Traits::kTileM) return;
    const std::uint32_t base = smem_address(smem.q);
    if constexpr (!Traits::k8Bit) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(base + q_offset<Traits>(row, unit)), "r"(value.x),
                   "r"(value.y), "r"(value.z), "r"(value.w)
                   : "memory");
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
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(base + q_offset<Traits>(row, first) + half), "r"(value.x),
                 "r"(value.z)
                 : "memory");
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(base + q_offset<Traits>(row, first + 1) + half), "r"(value.y),
                 "r"(value.w)
                 : "memory");
  }
};

// Two columns of out.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t pack_out(const AttnParams& params, float lo, float hi) {
  if constexpr (Traits::k8Bit) {
    if (params.q_dtype != DataType::kFloat16) return pack_pair<cutlass::bfloat16_t>(lo, hi);
  }
  return pack_pair<typename Traits::Element>(lo, hi);
}

// Merges a row's groups: what each multiplies its O by, and where the row goes. Threads below kTileM, a row each.
template <class Traits>
BROADHEAD_DEVICE void finish_tile_row(const AttnParams& params, const Workspace& workspace, const LineItem& item,
                                      typename Traits::SharedStorage& smem, int row) {
  const DecodeTile& tile = smem.tile;
  const ScoreScale scale = tile.scale;
  const RowPlace place = place_row(tile.output, row);
  float largest = smem.stats[0][row].x;
  BROADHEAD_UNROLL
  for (int g = 1; g < Traits::kKeyGroups; ++g) largest = fmaxf(largest, smem.stats[g][row].x);
  float factor[Traits::kKeyGroups];
  float sum = 0.f;
  BROADHEAD_UNROLL
  for (int g = 0; g < Traits::kKeyGroups; ++g) {
    const float2 own = smem.stats[g][row];
    // A group without a visible key has sum 0 (or NaN scores, which must get through).
    factor[g] = own.x == -INFINITY ? (own.y == 0.f ? 0.f : 1.f) : exp2f((own.x - largest) * scale.scale_log2);
    sum += own.y * factor[g];
  }
  const bool is_part = item.is_part != 0;
  const auto finish = [&](auto element) {
    return finish_row<decltype(element)>(params, place, {largest, sum}, scale, is_part ? 0 : -1);
  };
  const bool out_is_bf16 = Traits::k8Bit && params.q_dtype != DataType::kFloat16;
  const RowResult result = out_is_bf16 ? finish(cutlass::bfloat16_t{}) : finish(typename Traits::Element{});
  const float out_factor = Traits::k8Bit ? result.inverse * scale.v_factor : result.inverse;
  BROADHEAD_UNROLL
  for (int g = 0; g < Traits::kKeyGroups; ++g) smem.factor[g][row] = factor[g] * out_factor;
  if (!place.live) {
    smem.target[row] = nullptr;
  } else if (is_part) {
    const long long slot = workspace.slot(params, item, blockIdx.x);
    smem.target[row] = workspace.out_row(params, slot, row);
    *workspace.lse_row(slot, row) = result.lse;
  } else {
    smem.target[row] = output_row<typename Traits::Element>(params, tile.seqlen, place);  // any 16-bit dtype
    write_lse(params, tile.seqlen, place, result.lse, -1);
  }
}

// All threads, behind the tile's last product. Shared memory of Q serves the exchange.
template <class Traits>
BROADHEAD_DEVICE void write_item(const AttnParams& params, const Workspace& workspace, const LineItem& item,
                                 typename Traits::SharedStorage& smem,
                                 const float (&o)[Traits::kMmaM][Traits::kOTiles][4],
                                 OnlineSoftmax<2 * Traits::kMmaM>& softmax) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = warp % Traits::kKeyGroups;
  const int col_group = warp / Traits::kKeyGroups;
  softmax.reduce_sum();
  if (col_group == 0 && lane % 4 == 0) {
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
      const int row = i / 2 * 16 + i % 2 * 8 + lane / 4;
      smem.stats[group][row] = make_float2(softmax.row_max[i], softmax.row_sum[i]);
    }
  }
  __syncthreads();
  if (threadIdx.x < Traits::kTileM) finish_tile_row<Traits>(params, workspace, item, smem, threadIdx.x);
  __syncthreads();
  float factor[2 * Traits::kMmaM];
  BROADHEAD_UNROLL
  for (int i = 0; i < 2 * Traits::kMmaM; ++i) factor[i] = smem.factor[group][i / 2 * 16 + i % 2 * 8 + lane / 4];

  constexpr int kTilesPerPass = Traits::kMergeCols / 8;
  BROADHEAD_UNROLL
  for (int pass = 0; pass < Traits::kCols / Traits::kMergeCols; ++pass) {
    if (pass > 0) __syncthreads();  // the columns before are out
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
      const int row = i / 2 * 16 + i % 2 * 8 + lane / 4;
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
      void* target = smem.target[row];
      if (target == nullptr || col >= params.head_dim_v) continue;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      BROADHEAD_UNROLL
      for (int g = 0; g < Traits::kKeyGroups; ++g) {
        const float4 x = *reinterpret_cast<const float4*>(&smem.merge[col_group * Traits::kKeyGroups + g][row][quad]);
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
      }
      if (item.is_part) {
        *reinterpret_cast<float4*>(static_cast<float*>(target) + col) = sum;
      } else {
        *reinterpret_cast<uint2*>(static_cast<Element*>(target) + col) =
            make_uint2(pack_out<Traits>(params, sum.x, sum.y), pack_out<Traits>(params, sum.z, sum.w));
      }
    }
  }
}

}  // namespace broadhead::decode
