// Merges the parts of split tiles: out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p).
#pragma once

#include "common/row_result.h"
#include "decode/dependent_launch.h"
#include "decode/line.h"
#include "decode/workspace.h"

namespace broadhead::decode {

constexpr int kCombineWarps = 8;
constexpr int kCombineCols = 128;  // of a block: four a lane

// A row's parts lie in slots first, rest, rest + step, ...
struct PartSlots {
  long long first;
  long long rest;
  int step;
  int parts;

  BROADHEAD_DEVICE long long at(int part) const {
    return part == 0 ? first : rest + static_cast<long long>(part - 1) * step;
  }
};

// Parts of the tile that block `block` of the decode grid began, and that goes on: up to the first block behind it that
// the tile does not pass through. All threads.
BROADHEAD_DEVICE int count_parts(const Workspace& workspace, int block) {
  int parts = 2;
  for (int first = block + 1;; first += blockDim.x) {
    const int other = first + threadIdx.x;
    const int passes = other < workspace.num_blocks ? workspace.blocks[other].passes : 0;
    const int passed = __syncthreads_count(passes);
    // Blocks behind the tile's last one may be inside another tile: count up to the first that is not passed.
    if (passed == static_cast<int>(blockDim.x)) {
      parts += passed;
      continue;
    }
    __shared__ int end;
    if (threadIdx.x == 0) end = blockDim.x;
    __syncthreads();
    if (!passes) atomicMin(&end, threadIdx.x);
    __syncthreads();
    return parts + end;
  }
}

// Block (t, r, c): columns from 128 c on of row r of split tile t. Its warps take every eighth part.
template <class Element, int kTileM, int kKeys>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_kernel(const __grid_constant__ AttnParams params, const __grid_constant__ Workspace workspace) {
  __shared__ float4 partial[kCombineWarps][32];
  __shared__ float2 stats[kCombineWarps];
  launch_dependents();
  wait_for_predecessor();
  int batch, head, m_block;
  PartSlots slots;
  if (params.cell_blocks == 0) {
    const BlockParts own = workspace.blocks[blockIdx.x];
    if (own.batch < 0) return;
    batch = own.batch;
    head = own.head;
    m_block = own.m_block;
    slots = {2ll * blockIdx.x + 1, 2ll * blockIdx.x + 2, 2, count_parts(workspace, blockIdx.x)};
  } else {
    const int heads = heads_in_grid(params);
    m_block = blockIdx.x % workspace.m_blocks;
    head = blockIdx.x / workspace.m_blocks % heads;
    batch = blockIdx.x / workspace.m_blocks / heads;
    const SequenceWork work = sequence_work(params, batch, kTileM, kKeys);
    if (m_block >= work.tiles / heads) return;
    const long long first = static_cast<long long>(blockIdx.x) * workspace.cells;
    slots = {first, first + 1, 1, cells_of(work, params.cell_blocks)};
    if (slots.parts == 1) return;
  }
  const int row = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int col = blockIdx.z * kCombineCols + lane * 4;

  // A warp's parts relative to the largest LSE among them; the sums do not wait for the LSEs of others.
  float largest = -INFINITY;
  float sum = 0.f;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  constexpr int kAtOnce = 8;
  for (int first = warp; first < slots.parts; first += kAtOnce * kCombineWarps) {
    float lse[kAtOnce];
    float4 x[kAtOnce];
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int part = first + i * kCombineWarps;
      const bool exists = part < slots.parts;
      const long long slot = slots.at(exists ? part : 0);
      lse[i] = exists ? *workspace.lse_row(slot, row) : -INFINITY;
      x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (exists && col < params.head_dim_v) {
        x[i] = *reinterpret_cast<const float4*>(workspace.out_row(params, slot, row) + col);
      }
    }
    float raised = largest;
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) raised = fmaxf(raised, lse[i]);
    const float reference = raised == -INFINITY ? 0.f : raised;
    const float factor = exp2f((largest - reference) * kLog2e);
    largest = raised;
    sum *= factor;
    total = make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor);
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = exp2f((lse[i] - reference) * kLog2e);
      sum += weight;
      total.x += weight * x[i].x;
      total.y += weight * x[i].y;
      total.z += weight * x[i].z;
      total.w += weight * x[i].w;
    }
  }
  partial[warp][lane] = total;
  if (lane == 0) stats[warp] = make_float2(largest, sum);
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  const int per_token = rows_per_token(params);
  const int first_row = m_block * kTileM;
  const OutputRows output{{first_row, per_token, min_int(first_row + kTileM, seqlen.seqlen_q * per_token)}, head};
  const RowPlace place = place_row(output, row);
  __syncthreads();
  if (warp != 0 || !place.live) return;

  BROADHEAD_UNROLL
  for (int w = 0; w < kCombineWarps; ++w) largest = fmaxf(largest, stats[w].x);
  const float sink = params.sinks != nullptr ? load_sink<Element>(params, place.head) : -INFINITY;
  const float reference = largest == -INFINITY ? 0.f : fmaxf(largest, sink);
  sum = 0.f;
  total = make_float4(0.f, 0.f, 0.f, 0.f);
  BROADHEAD_UNROLL
  for (int w = 0; w < kCombineWarps; ++w) {
    const float weight = exp2f((stats[w].x - reference) * kLog2e);
    const float4 x = partial[w][lane];
    sum += weight * stats[w].y;
    total.x += weight * x.x;
    total.y += weight * x.y;
    total.z += weight * x.z;
    total.w += weight * x.w;
  }
  const bool empty = sum == 0.f;  // no visible key: out 0, LSE -inf, whatever the sink
  if (!empty && sink != -INFINITY) sum += exp2f((sink - reference) * kLog2e);
  const float inverse = empty ? 0.f : 1.f / sum;
  if (threadIdx.x == 0 && blockIdx.z == 0) {
    write_lse(params, seqlen, place, empty ? -INFINITY : reference + logf(sum), -1);
  }
  if (col < params.head_dim_v) {
    *reinterpret_cast<uint2*>(output_row<Element>(params, seqlen, place) + col) =
        make_uint2(pack_pair<Element>(total.x * inverse, total.y * inverse),
                   pack_pair<Element>(total.z * inverse, total.w * inverse));
  }
}

}  // namespace broadhead::decode
