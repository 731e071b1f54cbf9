// The combine kernel of decode: merges the splits of tiles, out = sum_i exp(lse_i - lse) out_i with
// lse = log sum_i exp(lse_i).
#pragma once

#include "common/dependent_launch.h"
#include "common/row_result.h"
#include "decode/rows.h"
#include "decode/workspace.h"

namespace broadhead::decode {

constexpr int kCombineWarps = 8;
constexpr int kCombineCols = 128;  // columns that a warp merges at a time, four a lane

// What a CTA of the combine merges: one row of a tile that was split.
struct SplitRow {
  SeqlenInfo seqlen{};
  int batch = 0;
  int head = 0;
  int m_block = 0;
  RowSplits own;     // no splits: there is nothing to merge
  RowSplits shared;  // those of the same query over the shared keys

  BROADHEAD_DEVICE int splits() const { return own.splits + shared.splits; }
  // The place of a split's row among the rows of all slots.
  BROADHEAD_DEVICE long long place(const Workspace& workspace, int split) const {
    const bool is_own = split < own.splits;
    const int slot = is_own ? own.slot(split) : shared.slot(split - own.splits);
    return static_cast<long long>(slot) * workspace.slot_rows + (is_own ? own.row : shared.row);
  }
};

// Whether a tile passes through the thread's CTA behind `cta`.
BROADHEAD_DEVICE int read_passes(const Workspace& workspace, int cta) {
  const int other = cta + 1 + threadIdx.x;
  return other < workspace.num_ctas ? workspace.ctas[other].passes : 0;
}

// How many splits the tile has that CTA `cta` of the decode grid began and did not finish: they end at the first CTA
// behind it that the tile does not pass through. `passes` is the thread's read_passes. All threads call this.
BROADHEAD_DEVICE int count_splits(const Workspace& workspace, int cta, int passes) {
  __shared__ int passed[2][kCombineWarps];
  int splits = 2;
  for (int buffer = 0;; buffer ^= 1) {
    const unsigned open = ~__ballot_sync(0xffffffffu, passes);
    if (threadIdx.x % 32 == 0) passed[buffer][threadIdx.x / 32] = open == 0 ? 32 : __ffs(open) - 1;
    __syncthreads();
    for (int w = 0; w < kCombineWarps; ++w) {
      const int in_warp = passed[buffer][w];
      splits += in_warp;
      if (in_warp < 32) return splits;
    }
    cta += 32 * kCombineWarps;
    passes = read_passes(workspace, cta);
  }
}

// Finds the row that this CTA merges. All threads call this.
template <int kTileM, int kTileN>
BROADHEAD_DEVICE SplitRow find_split_row(const DecodeParams& params, const Workspace& workspace) {
  const int cta = blockIdx.x;
  const int row = blockIdx.y;
  SplitRow found;
  if (workspace.ctas != nullptr) {
    const CtaSplits own = workspace.ctas[cta];
    const int passes = read_passes(workspace, cta);
    if (own.batch < 0) return found;
    const RowSplits splits = stream_k_splits(workspace, count_splits(workspace, cta, passes), row, cta);
    return {own.seqlen, own.batch, own.head, own.m_block, splits, {}};
  }
  const TileSplits noted = workspace.tiles != nullptr ? workspace.tiles[cta] : TileSplits{};
  found.m_block = cta % workspace.m_blocks;
  found.head = cta / workspace.m_blocks % params.heads_in_grid;
  found.batch = cta / workspace.m_blocks / params.heads_in_grid;
  const SequenceWork work = sequence_work(params, found.batch, kTileM, kTileN);
  found.seqlen = work.seqlen;
  if (found.m_block >= work.m_blocks) return found;
  if (workspace.tiles != nullptr) {
    const int query = found.m_block * kTileM + row;
    if (query >= sequence_rows(params, work.seqlen, found.batch)) return found;
    found.shared = shared_splits(params, workspace, work.seqlen, found.head, query, kTileM);
    if (found.shared.splits > 0) found.own = noted_splits(workspace, cta, noted, row);
    return found;
  }
  const int splits = num_fixed_splits(params, work, kTileN);
  const int first = cta * workspace.fixed_splits;
  found.own = {splits > 1 ? splits : 0, row, first, first + 1, 1};
  return found;
}

// Merges one row. All threads call this: kColGroups warps cover the columns, and groups of so many warps take every
// kSplitGroups-th split. A CTA for each 128 columns instead would mean four times as many CTAs at head_dim 512, most of
// them idle: PERF(H200, 16 x 8k, 32/4 heads of 512, us: 264 -> 255).
template <class Element, int kTileM, int kColGroups>
BROADHEAD_DEVICE void combine_splits(const DecodeParams& params, const Workspace& workspace, const SplitRow& tile) {
  __shared__ float4 partial[kCombineWarps][32];
  __shared__ float2 stats[kCombineWarps];
  const int splits = tile.splits();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  constexpr int kSplitGroups = kCombineWarps / kColGroups;
  const int col = warp % kColGroups * kCombineCols + lane * 4;

  // A warp's splits relative to the largest LSE among them; the sums do not wait for the LSEs of others.
  float largest = -INFINITY;
  float sum = 0.f;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  constexpr int kAtOnce = 8;
  for (int first = warp / kColGroups; first < splits; first += kAtOnce * kSplitGroups) {
    float lse[kAtOnce];
    float4 x[kAtOnce];
    BROADHEAD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = first + i * kSplitGroups;
      const bool exists = split < splits;
      const long long place = tile.place(workspace, exists ? split : 0);
      lse[i] = exists ? workspace.lse[place] : -INFINITY;
      x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (exists && col < params.head_dim_v) {
        x[i] = *reinterpret_cast<const float4*>(workspace.out + place * params.head_dim_v + col);
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
  const RowPlace place =
      place_row({tile_rows<kTileM>(params, tile.seqlen, tile.batch, tile.m_block), tile.head}, tile.own.row);
  __syncthreads();
  if (warp >= kColGroups) return;

  BROADHEAD_UNROLL
  for (int w = warp; w < kCombineWarps; w += kColGroups) largest = fmaxf(largest, stats[w].x);
  const float sink = params.sinks != nullptr && place.live ? load_sink<Element>(params, place.head) : -INFINITY;
  const float reference = largest == -INFINITY ? 0.f : fmaxf(largest, sink);
  sum = 0.f;
  total = make_float4(0.f, 0.f, 0.f, 0.f);
  BROADHEAD_UNROLL
  for (int w = warp; w < kCombineWarps; w += kColGroups) {
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
  if (threadIdx.x == 0) {
    write_lse(params, tile.seqlen, place, empty ? -INFINITY : reference + logf(sum), -1);
  }
  if (place.live && col < params.head_dim_v) {
    *reinterpret_cast<uint2*>(output_row<Element>(params, tile.seqlen, place) + col) =
        make_uint2(pack_pair<Element>(total.x * inverse, total.y * inverse),
                   pack_pair<Element>(total.z * inverse, total.w * inverse));
  }
}

// CTA (t, r) merges row r: with fixed splits or shared keys the row of tile t, in dense order, else the row of the tile
// that CTA t of the decode grid began.
template <class Element, int kTileM, int kTileN, int kHeadDim>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ Workspace workspace) {
  launch_dependents();
  wait_for_predecessor();
  const SplitRow tile = find_split_row<kTileM, kTileN>(params, workspace);
  if (tile.own.splits > 0) {
    combine_splits<Element, kTileM, ceil_div(kHeadDim, kCombineCols)>(params, workspace, tile);
  }
}

}  // namespace broadhead::decode
