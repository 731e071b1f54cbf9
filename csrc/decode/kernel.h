// The portable decode kernel: few query rows against many keys, bound by memory.
//
// The CTAs are persistent and follow the stream-K schedule (stream_k.h). A warp copies ahead across the borders of
// tiles, so that the stream of K and V never stops. A CTA writes finished tiles, or partial results of splits, which
// the combine merges.
#pragma once

#include <cute/arch/copy.hpp>

#include "common/accumulator.h"
#include "common/dependent_launch.h"
#include "common/score.h"
#include "decode/epilogue.h"
#include "decode/load.h"
#include "decode/q_tile.h"
#include "decode/tile.h"

namespace broadhead::decode {

using namespace mma_sync;

// Sums S over the warps of a key group, each of which multiplied its own columns of head_dim. All of them sum in the
// order of the column groups, so all get equal scores.
template <class Traits>
BROADHEAD_DEVICE void add_scores(float (&s)[Traits::kMmaM][Traits::kMmaN][4], typename Traits::SharedStorage& smem,
                                 int buffer, int group, int warp, int lane) {
  float4* own = reinterpret_cast<float4*>(smem.scores[buffer][warp]);
  if constexpr (Traits::kScoreBuffers == 1) named_barrier_sync(1 + group, 32 * Traits::kColGroups);
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kMmaM; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kMmaN; ++n) {
      own[(m * Traits::kMmaN + n) * 32 + lane] = make_float4(s[m][n][0], s[m][n][1], s[m][n][2], s[m][n][3]);
    }
  }
  named_barrier_sync(1 + group, 32 * Traits::kColGroups);
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kMmaM; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kMmaN; ++n) {
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      BROADHEAD_UNROLL
      for (int c = 0; c < Traits::kColGroups; ++c) {
        const float4 x = reinterpret_cast<const float4*>(
            smem.scores[buffer][Traits::warp_of(group, c)])[(m * Traits::kMmaN + n) * 32 + lane];
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
      }
      s[m][n][0] = sum.x;
      s[m][n][1] = sum.y;
      s[m][n][2] = sum.z;
      s[m][n][3] = sum.w;
    }
  }
}

// Prefetches Q and the page tables into the L2, one cache line a thread. They thus travel (and their addresses are
// translated) together with the lengths, and not behind the first copies of K and V, whose queue is 5 us long. Nothing
// is read here, so this need not wait for the kernel before.
BROADHEAD_DEVICE void prefetch_inputs(const DecodeParams& params) {
  const unsigned offset = (blockIdx.x * blockDim.x + threadIdx.x) * 128;
  if (offset < params.q_bytes) {
    cute::prefetch(static_cast<const char*>(params.q) + offset);
  }
  if (offset < params.table_bytes) {
    cute::prefetch(reinterpret_cast<const char*>(params.page_table) + offset);
  }
  if (offset < params.shared_table_bytes) {
    cute::prefetch(reinterpret_cast<const char*>(params.shared_page_table) + offset);
  }
}

// Whether two items in shared memory agree in the word that this lane compares.
BROADHEAD_DEVICE bool same_item(const WorkItem& a, const WorkItem& b, int lane) {
  if (lane >= kItemWords) return true;
  return reinterpret_cast<const int*>(&a)[lane] == reinterpret_cast<const int*>(&b)[lane];
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ Workspace workspace) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = Traits::key_group(warp);

  launch_dependents();  // the combine may be launched now; it waits for the end of this grid
  prefetch_inputs(params);
  wait_for_predecessor();
  if (threadIdx.x == Traits::kThreads - 1) smem.splits = {{}, -1, 0, 0, 0};
  if (lane < Traits::kStages) smem.missing[warp * Traits::kStages + lane] = 0;
  if (threadIdx.x == 0) smem.some_missing = 0;
  find_interval<Traits>(params, smem);
  QueueState queue;
  Loader<Traits> loader(params, smem);
  const std::uint32_t ring = kept(smem_address(smem.ring[warp]));
  const std::uint32_t k_lane = kept(k_lane_offset<Traits>(lane));
  const std::uint32_t v_lane = kept(v_lane_offset<Traits>(lane));
  std::uint32_t beside_lane = 0;
  if constexpr (Traits::kWithQv) beside_lane = beside_lane_offset<Traits>(lane);
  int read = 0;  // offset of the stage that is read next
  // Waits for the next stage. `others`: kStages - 2 later copies may still be under way; else all copies are waited
  // for.
  const auto next_stage = [&](bool others) {
    if (__builtin_expect(others, 1)) {
      cp_async_wait<Traits::kStages - 2>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();  // the stage is complete for all lanes, and all have read the one before, which is filled next
    const std::uint32_t stage = ring + read;
    read = read == (Traits::kStages - 1) * Traits::kStageBytes ? 0 : read + Traits::kStageBytes;
    return stage;
  };

  int buffer = 0;  // of smem.scores
  QTile<Traits> q_tile;
  bool q_is_read = false;
  while (true) {
    const WorkItem& item = smem.queue[warp].items[queue.taken % kQueueItems];
    // The first pass finds the item, reads its Q and starts its copies: Q goes first, as behind the copies of K and V
    // it would queue for some 5 us. The second pass does the same for the items behind it. This is a loop to keep the
    // code small, since none of it is cached at the start.
#pragma unroll 1
    for (int wanted = 1; wanted <= kQueueItems; wanted += kQueueItems - 1) {
      fill_queue<Traits::kTileM, Traits::kTileN, Traits::kKeyGroups>(params, smem.queue[warp], queue, wanted,
                                                                     [&](const WorkItem& found) {
                                                                       if (wanted > 1)
                                                                         prefetch_q<Traits>(params, found);
                                                                     });
      if (queue.found == queue.taken) break;
      if (QTile<Traits>::kInRegisters && wanted == 1 && !q_is_read) q_tile.read(params, item);
#pragma unroll 1
      while (loader.ahead() < Traits::kNBlocksAhead && loader.issue_k(queue.found)) loader.issue_v();
    }
    if (queue.found == queue.taken) break;
    __syncthreads();  // no thread reads the previous tile any more
    if (threadIdx.x == 0) set_tile<Traits>(params, item, smem.tile);
    if (const int row = threadIdx.x - (Traits::kThreads - Traits::kTileM); row >= 0) {
      set_row<Traits>(params, workspace, item, row, smem.rows[row]);
    }
    if (threadIdx.x == Traits::kThreads - 1) note_split(params, workspace, item, blockIdx.x, smem.splits);
    const float q_scale = q_tile.find_scale(params, item, smem);
    if constexpr (QTile<Traits>::kInRegisters) {
      q_tile.store(params, q_scale, smem);
    } else {
      q_tile.copy(params, item, q_scale, smem);
    }
    if (Traits::k8Bit && threadIdx.x == 0) smem.tile.scale.divide(q_scale);
    // Each warp finds its items by itself, from lengths that another stream may change meanwhile. Warps with different
    // items would wait for each other for ever, so the CTA ends instead.
    if (__syncthreads_count(same_item(smem.queue[0].items[queue.taken % kQueueItems], item, lane)) !=
        Traits::kThreads) {
      break;
    }
    const std::uint32_t q = kept(q_lane_address<Traits>(smem, Traits::col_group(warp) * Traits::kCols, lane));
    QFragments<Traits> q_registers;
    if constexpr (Traits::kQInRegisters) {
      BROADHEAD_UNROLL
      for (int step = 0; step < Traits::kSteps; ++step) load_q_fragment<Traits>(q_registers[step], q, step);
      if constexpr (Traits::kWithQv) {
        const int first_col = Traits::kHeadDim + Traits::col_group(warp) * Traits::kBesideCols;
        load_q_fragment<Traits>(q_registers[Traits::kSteps], q_lane_address<Traits>(smem, first_col, lane), 0);
      }
    }
    // O of 32 rows leaves no registers for these, so they are then read from shared memory where they are used.
    const std::conditional_t<Traits::kMmaM == 1, float, float&> scale_log2 = smem.tile.scale.scale_log2;
    const std::conditional_t<Traits::kMmaM == 1, bool, bool&> transform = smem.tile.scale.transform;
    const std::conditional_t<Traits::kMmaM == 1, KeyInterval, KeyInterval&> unmasked = smem.tile.unmasked;
    OnlineSoftmax<2 * Traits::kMmaM> softmax;
    float o[Traits::kMmaM][Traits::kOTiles][4] = {};

    const BlockRange range = item.range;
    for (int n_block = range.begin + group; n_block < range.end; n_block += Traits::kKeyGroups) {
      float s[Traits::kMmaM][Traits::kMmaN][4];
      const bool full = loader.ahead() == Traits::kNBlocksAhead;
      const std::uint32_t first = next_stage(full);
      const bool issued = loader.issue_k(queue.found);
      clear_accumulators(s);
      if constexpr (Traits::kWithQv) qk_gemm_beside<Traits>(s, q_registers, first + beside_lane);
      qk_gemm<Traits>(s, q_registers, q, first + k_lane);
      if constexpr (Traits::kColGroups > 1) {
        add_scores<Traits>(s, smem, buffer, group, warp, lane);
        if constexpr (Traits::kScoreBuffers == 2)
          buffer ^= 1;  // other warps may still read this one until the barrier of the next n_block
      }
      if (__builtin_expect(transform, 0)) {
        const ScoreScale scale = smem.tile.scale;
        transform_scores(s, scale);
      }
      if (__builtin_expect(smem.some_missing != 0, 0)) {
        const std::uint32_t missing = loader.missing_beside(first);
        hide_missing(s, [&](int n) { return missing_pair(missing, n); });
        __syncwarp();  // all lanes have read it
        loader.missing_beside(first) = 0;
      }
      const int key0 = n_block * Traits::kTileN;
      if (__builtin_expect(key0 < unmasked.begin || key0 + Traits::kTileN > unmasked.end, 0)) {
        apply_mask(s, smem.tile.mask, unmasked, smem.tile.rows, 0, key0, lane);
      }
      float block_max[2 * Traits::kMmaM], factor[2 * Traits::kMmaM];
      softmax.block_max(s, block_max);
      if (__builtin_expect(softmax.raise(block_max, scale_log2, factor), 0)) {
        scale_rows(o, factor);
      }
      softmax.template exponentiate<0, Traits::kMmaN>(s, scale_log2, [](float x) { return exp2_approx(x); });
      // O of 32 rows leaves no registers for S during the wait for V: P takes half as many.
      constexpr bool kPackFirst = Traits::kMmaM > 1;
      std::uint32_t packed[kPackFirst ? Traits::kTileN / 16 : 1][Traits::kMmaM][4];
      if constexpr (kPackFirst) {
        BROADHEAD_UNROLL
        for (int step = 0; step < Traits::kTileN / 16; ++step) {
          pack_p<typename Traits::Element>(packed[step], s, step);
        }
      }
      std::uint32_t v = first;
      if constexpr (!Traits::kWithQv) {
        v = next_stage(full && issued);
        if (issued) loader.issue_v();
      }
      const auto take_p = [&](std::uint32_t (&p)[Traits::kMmaM][4], int step) {
        if constexpr (!kPackFirst) {
          pack_p<typename Traits::Element>(p, s, step);
        } else {
          BROADHEAD_UNROLL
          for (int m = 0; m < Traits::kMmaM; ++m) {
            BROADHEAD_UNROLL
            for (int i = 0; i < 4; ++i) p[m][i] = packed[step][m][i];
          }
        }
      };
      pv_gemm<Traits>(o, take_p, v + v_lane);
      loader.n_block_done();
    }
    q_is_read = QTile<Traits>::kInRegisters && queue.found - queue.taken > 1;
    if (q_is_read) q_tile.read(params, smem.queue[warp].items[(queue.taken + 1) % kQueueItems]);
    write_item<Traits>(params, item, smem, o, softmax);
    ++queue.taken;
  }
  if (threadIdx.x == Traits::kThreads - 1 && workspace.ctas != nullptr) workspace.ctas[blockIdx.x] = smem.splits;
}

}  // namespace broadhead::decode
