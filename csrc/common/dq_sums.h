// The fp32 sums of dQ in global memory to which fused backward kernels add, and the kernel that makes dQ of them.
//
// They lie as accumulators do, so that a warp adds and reads whole lines: in blocks of 16 queries x 8 columns, the four
// numbers of each lane. Queries come in tiles of Layout::kRows, each of one sequence; Layout::block(row_tile, col_tile)
// is the place of a block within its tile, of Layout::kColumns columns (a multiple of 64).
//
// The addition is PTX: CUTLASS has none, and nvcc (13.0) makes of CUDA's atomicAdd of four numbers an instruction that
// returns what was there.
#pragma once

#include "common/gradient_rows.h"
#include "common/seqlen_info.h"
#include "host/params.h"

namespace broadhead {

// Blocks in the order of their rows, then of their columns.
template <int kRows_, int kColumns_>
struct RowMajorDqSums {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  BROADHEAD_HOST_DEVICE static constexpr int block(int row_tile, int col_tile) {
    return row_tile * (kColumns / 8) + col_tile;
  }
};

// Tiles of `rows` queries of a head before those of a sequence: of all rows before it, and one more a sequence, since
// each may begin one.
BROADHEAD_HOST_DEVICE std::int64_t first_dq_tile(const AttnBwdParams& params, const SeqlenInfo& seqlen, int batch,
                                                 int rows) {
  return (seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q) / rows + batch;
}

// All tiles of a head.
BROADHEAD_HOST_DEVICE std::int64_t dq_tiles(const AttnBwdParams& params, int rows) {
  return params.total_q / rows + params.batch;
}

// The sums of a sequence and head, from its query 0 on.
template <class Layout, class Sums>
BROADHEAD_DEVICE Sums* dq_sums_of(Sums* sums, const AttnBwdParams& params, const SeqlenInfo& seqlen, int batch,
                                  int head) {
  const std::int64_t tile =
      head * dq_tiles(params, Layout::kRows) + first_dq_tile(params, seqlen, batch, Layout::kRows);
  return sums + tile * (Layout::kRows * Layout::kColumns);
}

constexpr int kDqBlockFloats = 16 * 8;

// Before 9.0 a lane adds one number at a time, so that there those of the 32 lanes lie side by side.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kDqVectors = true;
#else
constexpr bool kDqVectors = false;
#endif

// Adds a lane's numbers to a block. Additions have no order.
BROADHEAD_DEVICE void add_dq_block(float* block, int lane, const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(block + lane * 4), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
#else
  BROADHEAD_UNROLL
  for (int c = 0; c < 4; ++c) atomicAdd(block + c * 32 + lane, x[c]);
#endif
}

BROADHEAD_DEVICE void load_dq_block(const float* block, int lane, float (&x)[4]) {
  if constexpr (kDqVectors) {
    const float4 y = reinterpret_cast<const float4*>(block)[lane];
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else {
    BROADHEAD_UNROLL
    for (int c = 0; c < 4; ++c) x[c] = block[c * 32 + lane];
  }
}

constexpr int kFinishThreads = 256;
constexpr int kFinishRows = 64;

// A CTA: 64 queries of a head. A warp takes 16 of them and half the columns.
template <class Element, class Layout>
__global__ void __launch_bounds__(kFinishThreads)
    finish_dq(const __grid_constant__ AttnBwdParams params, const float* sums) {
  constexpr int kTiles = Layout::kColumns / 16;
  constexpr int kRowTiles = Layout::kRows / 16;
  const int head = blockIdx.y, batch = blockIdx.z;
  SeqlenInfo seqlen;
  locate_queries(params, batch, seqlen);
  const int first_row = blockIdx.x * kFinishRows;
  if (first_row >= seqlen.seqlen_q) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_tile = blockIdx.x * (kFinishRows / 16) + warp % 4, half = warp / 4;
  const float* of_tile = dq_sums_of<Layout>(sums, params, seqlen, batch, head) +
                         static_cast<std::int64_t>(row_tile / kRowTiles) * (Layout::kRows * Layout::kColumns);
  float dq[kTiles][4];
  BROADHEAD_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    load_dq_block(of_tile + Layout::block(row_tile % kRowTiles, half * kTiles + n) * kDqBlockFloats, lane, dq[n]);
  }
  const int first_col = half * (kTiles * 8);
  write_gradient(dq, params.softmax_scale,
                 gradient_rows<Element>(static_cast<Element*>(params.dq) + first_col, params.dq_strides, seqlen.batch_q,
                                        seqlen.row_q, head, seqlen.seqlen_q, params.head_dim - first_col),
                 row_tile * 16 + lane / 4, {true, true});
}

}  // namespace broadhead
