// Q of an item: prefetched into the L2, read, converted and stored to shared memory.
//
// The loads are PTX: they must be volatile, and CUTLASS's global_load is under a predicate.
#pragma once

#include <cutlass/arch/memory.h>
#include <cute/arch/copy.hpp>

#include "decode/gemm.h"

namespace broadhead::decode {

// The offset, in elements, of a row of the item's tile in q (kQv: in qv); -1 when the row is past the sequence.
template <class Traits, bool kQv>
BROADHEAD_DEVICE std::int64_t q_row_offset(const DecodeParams& params, const WorkItem& item, int tile_row) {
  const SeqlenInfo& seqlen = item.seqlen;
  const Divisor& per_token = params.rows_per_token;
  const int row = item.m_block * Traits::kTileM + tile_row;
  if (row >= sequence_rows(params, seqlen, item.batch)) return -1;
  const int token = per_token.quotient(row);
  const int head = item.head * per_token + row - token * per_token;
  const TensorStrides& strides = kQv ? params.qv_strides : params.q_strides;
  return seqlen.batch_q * strides.batch + (seqlen.row_q + token) * strides.row + head * strides.head;
}

// Prefetches the item's rows of q (kQv: of qv) into the L2.
template <class Traits, bool kQv>
BROADHEAD_DEVICE void prefetch_rows(const DecodeParams& params, const WorkItem& item) {
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

// Prefetches all query rows of an item into the L2, since the memory is busy with K and V when they are read. Each warp
// prefetches some of them.
template <class Traits>
BROADHEAD_DEVICE void prefetch_q(const DecodeParams& params, const WorkItem& item) {
  if constexpr (Traits::kWithQv) prefetch_rows<Traits, true>(params, item);
  prefetch_rows<Traits, false>(params, item);
}

// Carries a thread's part of Q from global to shared memory, eight columns of a row at a time.
template <class Traits>
struct QTile {
  static constexpr int kUnits = Traits::kQCols / 8;  // units of eight columns in a row
  static constexpr int kEach = ceil_div(Traits::kTileM * kUnits, Traits::kThreads);
  // Q is read while nothing else needs registers; a large tile is copied a piece at a time.
  static constexpr bool kInRegisters = kEach <= 5 && Traits::kTileM == 16;
  uint4 values[kInRegisters ? kEach : 1];

  BROADHEAD_DEVICE void read(const DecodeParams& params, const WorkItem& item) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kEach; ++i) values[i] = read_unit(params, item, i);
  }

  // The power of two by which Q is multiplied so that fp16 holds it. All threads call this; it has a barrier.
  BROADHEAD_DEVICE float find_scale(const DecodeParams& params, const WorkItem& item,
                                    typename Traits::SharedStorage& smem) const {
    if constexpr (!Traits::k8Bit) return 1.f;
    if (params.q_dtype != DataType::kBFloat16) return 1.f;
    unsigned largest = 0;  // the bits of a bf16 without its sign
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
    // The factor brings the largest number of the tile into [2^14, 2^15).
    const int exponent = static_cast<int>(largest >> 7) - 127;
    return exp2f(static_cast<float>(14 - max_int(-100, min_int(100, exponent))));
  }

  BROADHEAD_DEVICE void store(const DecodeParams& params, float scale, typename Traits::SharedStorage& smem) const {
    BROADHEAD_UNROLL
    for (int i = 0; i < kEach; ++i) store_unit(params, smem, i, values[i], scale);
  }

  // Does what read and store do, but holds few units in registers at a time.
  BROADHEAD_DEVICE static void copy(const DecodeParams& params, const WorkItem& item, float scale,
                                    typename Traits::SharedStorage& smem) {
#pragma unroll 2
    for (int i = 0; i < kEach; ++i) store_unit(params, smem, i, read_unit(params, item, i), scale);
  }

 private:
  // With qv the first kQvEach units of a thread are of qv, the others of q.
  static constexpr int kQvUnits = Traits::kWithQv ? Traits::kHeadDim / 8 : 0;  // units of qv in a row
  static constexpr int kQvEach = Traits::kTileM * kQvUnits / Traits::kThreads;
  static constexpr int kOwnUnits = kUnits - kQvUnits;
  static_assert(Traits::kTileM * kQvUnits % Traits::kThreads == 0);

  BROADHEAD_DEVICE static int index_of(int i) { return threadIdx.x + i * Traits::kThreads; }

  BROADHEAD_DEVICE static uint4 read_unit(const DecodeParams& params, const WorkItem& item, int i) {
    if constexpr (Traits::kWithQv) {
      if (i < kQvEach) return read_unit_of<true, kQvUnits>(params, item, index_of(i));
    }
    return read_unit_of<false, kOwnUnits>(params, item, index_of(i - kQvEach));
  }

  // Reads a unit of q (kQv: of qv), which has kOfRow units a row. Rows past the sequence and columns past head_dim
  // become zero.
  template <bool kQv, int kOfRow>
  BROADHEAD_DEVICE static uint4 read_unit_of(const DecodeParams& params, const WorkItem& item, int index) {
    const int row = index / kOfRow, col = index % kOfRow * 8;
    if (row >= Traits::kTileM || col >= (kQv ? params.head_dim_v : params.head_dim)) return make_uint4(0, 0, 0, 0);
    const std::int64_t offset = q_row_offset<Traits, kQv>(params, item, row);
    if (offset < 0) return make_uint4(0, 0, 0, 0);
    // The loads are volatile so that the compiler does not move them behind the copies of K and V.
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
    constexpr int kOfRow = Traits::kHeadDim / 8;  // units of qv in a row
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
    // A lane's four bytes of K are columns 4 t to 4 t + 3 of a step of 16, but stand at positions 2 t, 2 t + 1, 2 t + 8
    // and 2 t + 9 of its B fragment (m16n8k16). The columns of Q are permuted to match.
    const int first = unit / 2 * 2;
    const std::uint32_t half = unit % 2 * 8;
    const uint2 low = make_uint2(value.x, value.z), high = make_uint2(value.y, value.w);
    cutlass::arch::shared_store<8>(base + q_offset<Traits>(row, first) + half, &low);
    cutlass::arch::shared_store<8>(base + q_offset<Traits>(row, first + 1) + half, &high);
  }
};

}  // namespace broadhead::decode
