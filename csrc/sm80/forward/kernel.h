// The portable forward kernel: one CTA computes one tile (an m_block of one head of one sequence), or one split of it.
//
// K and V stream through a ring of kStages stages (cp.async). In every step a warp waits for the stage, meets the other
// warps of the CTA once, refills the stage that was used a step ago, and multiplies. Q stays in shared memory for the
// whole tile.
#pragma once

#include "common/accumulator.h"
#include "common/online_softmax.h"
#include "common/plain_call.h"
#include "common/scheduler_metadata.h"
#include "common/score.h"
#include "common/tile_scheduler.h"
#include "sm80/forward/epilogue.h"
#include "sm80/forward/load.h"
#include "sm80/forward/mainloop.h"

namespace broadhead::sm80 {

using namespace mma_sync;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    forward_kernel(const __grid_constant__ AttnParams params, const __grid_constant__ TileGrid grid) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);

  assume_call<Traits>(params);

  // ---- the tile
  const int thread = threadIdx.x;
  const int split = Traits::kPlainCall ? 0 : blockIdx.y;
  const TileState<Element>& state = smem.state;
  const KvSource<Element>& source = state.source;
  if (thread == 0) {
    const WorkTile tile = grid.tile(blockIdx.x);
    smem.any_missing = 0;
    make_tile_state(smem.state, params, tile, read_lengths(params, tile.batch), split,
                    {.rows = Traits::kTileM,
                     .keys = Traits::kTileN,
                     .head_dim = Traits::kHeadDim,
                     .head_dim_v = Traits::kHeadDim,
                     .cluster = 1,
                     .plain = Traits::kPlainCall,
                     .pages = Traits::kPages});
  }
  __syncthreads();
  if (state.splits == 0) return;
  const BlockRange range = state.range;
  const bool paged = is_paged<Traits>(params);

  // Thread t resolves key t of an n_block: its page-table entry is loaded early, and its offsets are stored at the end
  // of the n_block before.
  const auto page_buffer = [&](int n_block) { return smem.pages[n_block % Traits::kPageBuffers]; };
  const auto load_page = [&](int n_block) {
    const int key = first_key_of<Traits>(state, n_block) + thread;
    // Entries of keys that are not live are never read, since they may be garbage.
    return is_live<Traits>(source.live, key) ? source.table[(source.leftpad + key) / params.page_size] : 0;
  };
  const auto store_page = [&](int n_block, int page) {
    const int key = first_key_of<Traits>(state, n_block) + thread;
    const int slot = (source.leftpad + key) % params.page_size;
    const bool live = is_live<Traits>(source.live, key);
    if (live && page_exists(params, page)) {
      page_buffer(n_block)[thread] = {page * params.k_strides.batch + slot * params.k_strides.row,
                                      page * params.v_strides.batch + slot * params.v_strides.row};
    } else {
      page_buffer(n_block)[thread] = {-1, -1};
      if (live) smem.any_missing = 1;
    }
  };
  if (paged && thread < Traits::kTileN) {
    BROADHEAD_UNROLL
    for (int i = 0; i <= Traits::kAhead; ++i) store_page(range.begin + i, load_page(range.begin + i));
  }

  // ---- the ring: issues chunk `position`, counted from the first chunk of `n_block`
  const std::uint32_t ring = smem_address(smem.ring);
  constexpr std::uint32_t kStageBytes = Traits::kStageElems * sizeof(Element);
  using KCopier = ChunkCopier<Traits, Traits::kTileN, Traits::kKChunk, true>;
  using VCopier = ChunkCopier<Traits, Traits::kVChunk, Traits::kVCols, false>;
  // Where registers allow, a thread's pointers walk along the keys instead of being computed for every stage.
  const Element* k_next = nullptr;
  const Element* v_next = nullptr;
  if constexpr (Traits::kWalkingPointers) {
    k_next = KCopier::first_element(source, range.begin * Traits::kTileN);
    v_next = VCopier::first_element(source, range.begin * Traits::kTileN);
  }
  std::uint32_t write_stage = ring;
  const auto issue = [&](int n_block, int position) {
    n_block += position / Traits::kChunks;
    const int chunk = position % Traits::kChunks;
    if (n_block < range.end) {
      const BlockRange whole = state.whole;
      const bool is_whole = n_block >= whole.begin && n_block < whole.end;
      if (chunk < Traits::kKChunks) {
        const int col0 = chunk * Traits::kKChunk;
        const int key0 = first_key_of<Traits>(state, n_block);
        const std::uint32_t target = write_stage + KCopier::target_offset();
        if (is_whole) {
          const Element* pointer = Traits::kWalkingPointers ? k_next : KCopier::first_element(source, key0);
          KCopier::copy_whole(target, pointer + col0, params.k_strides.row);
        } else if (Traits::kHeadDim <= 256 || col0 < params.head_dim) {
          KCopier::copy_edge(source, page_buffer(n_block), target, key0, 0, col0);
        }
        if (chunk == Traits::kKChunks - 1) k_next += Traits::kTileN * params.k_strides.row;
      } else {
        const int v_chunk = chunk - Traits::kKChunks;
        const int row0 = (v_chunk / Traits::kVColChunks) * Traits::kVChunk;
        const int col0 = (v_chunk % Traits::kVColChunks) * Traits::kVCols;
        const int key0 = first_key_of<Traits>(state, n_block) + row0;
        const std::uint32_t target = write_stage + VCopier::target_offset();
        if (is_whole) {
          const Element* pointer = Traits::kWalkingPointers ? v_next : VCopier::first_element(source, key0);
          VCopier::copy_whole(target, pointer + col0, params.v_strides.row);
        } else {
          VCopier::copy_edge(source, page_buffer(n_block), target, key0, row0, col0);
        }
        if (v_chunk % Traits::kVColChunks == Traits::kVColChunks - 1) {
          v_next += Traits::kVChunk * params.v_strides.row;
        }
      }
    }
    cute::cp_async_fence();
    write_stage = write_stage == ring + (Traits::kStages - 1) * kStageBytes ? ring : write_stage + kStageBytes;
  };

  if (paged) __syncthreads();
  if (range.begin < range.end) copy_q<Traits>(params, smem);
  BROADHEAD_UNROLL
  for (int position = 0; position < Traits::kStages - 1; ++position) issue(range.begin, position);

  // ---- warp state
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int warp_m = warp / Traits::kWarpsN;
  const int warp_n = warp % Traits::kWarpsN;
  const int warp_row = warp_m * Traits::kRowsPerWarp;
  const LaneAddresses<Traits> addresses(smem, warp_m, warp_n, lane);
  const ScoreScale& scale = state.scale;
  OnlineSoftmax<2 * Traits::kMmaM> softmax;
  float o[Traits::kMmaM][Traits::kOTiles][4];
  clear_accumulators(o);

  std::uint32_t q_registers[Traits::kQInRegisters ? Traits::kHeadDim / 16 : 1][Traits::kMmaM][4];
  if constexpr (Traits::kQInRegisters) {
    cp_async_wait<Traits::kStages - 2>();
    __syncthreads();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      load_q_fragment<Traits>(q_registers[step], addresses.q, step);
    }
  }

  std::uint32_t read_stage = ring;
  for (int n_block = range.begin; n_block < range.end; ++n_block) {
    int next_page = 0;
    if (paged && thread < Traits::kTileN) next_page = load_page(n_block + Traits::kAhead + 1);

    const auto begin_step = [&](int position) {
      cp_async_wait<Traits::kStages - 2>();
      __syncthreads();
      issue(n_block, position + Traits::kStages - 1);
      const std::uint32_t stage = read_stage;
      read_stage = stage == ring + (Traits::kStages - 1) * kStageBytes ? ring : stage + kStageBytes;
      return stage;
    };

    float s[Traits::kMmaM][Traits::kMmaN][4];
    clear_accumulators(s);
    BROADHEAD_UNROLL
    for (int chunk = 0; chunk < Traits::kKChunks; ++chunk) {
      const std::uint32_t stage = begin_step(chunk);
      if (Traits::kHeadDim <= 256 || chunk * Traits::kKChunk < params.head_dim) {
        qk_gemm<Traits>(s, q_registers, addresses.q, stage + addresses.k, chunk);
      }
    }

    if (!Traits::kPlainCall && scale.transform) transform_scores(s, scale);
    if (paged && smem.any_missing != 0) {  // this also hides keys that are not live, as the mask does
      const typename Traits::PagedRow* rows = page_buffer(n_block) + warp_n * Traits::kKeysPerWarp + lane % 4 * 2;
      hide_missing(s, [&](int n) { return rows[n * 8].unread() | rows[n * 8 + 1].unread() << 1; });
    }
    const int key0 = first_key_of<Traits>(state, n_block);
    if (key0 < state.unmasked.begin || key0 + Traits::kTileN > state.unmasked.end) {
      const int warp_key = key0 + warp_n * Traits::kKeysPerWarp;
      if constexpr (Traits::kPlainCall) {
        apply_plain_mask(s, plain_mask(state), state.output.rows, warp_row, warp_key, lane);
      } else {
        apply_mask(s, state.mask, state.unmasked, state.output.rows, warp_row, warp_key, lane);
      }
    }

    float block_max[2 * Traits::kMmaM];
    softmax.block_max(s, block_max);
    if constexpr (Traits::kSharedP) {
      // The other warps of this row group (warp_m) hold the other keys of the row.
      BROADHEAD_UNROLL
      for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
        const int row = warp_row + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
        if (lane % 4 == 0) smem.row_stats[warp_n * Traits::kTileM + row] = block_max[i];
      }
      named_barrier_sync(1 + warp_m, 32 * Traits::kWarpsN);
      BROADHEAD_UNROLL
      for (int i = 0; i < 2 * Traits::kMmaM; ++i) {
        const int row = warp_row + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
        float x = smem.row_stats[row];
        BROADHEAD_UNROLL
        for (int w = 1; w < Traits::kWarpsN; ++w) x = fmaxf(x, smem.row_stats[w * Traits::kTileM + row]);
        block_max[i] = x;
      }
    }
    float factor[2 * Traits::kMmaM];
    if (softmax.raise(block_max, scale.scale_log2, factor)) {
      scale_rows(o, factor);
    }
    const auto exp2 = [](float x) { return exp2_approx(x); };
    if constexpr (Traits::kSharedP) {
      softmax.template exponentiate<0, Traits::kMmaN>(s, scale.scale_log2, exp2);
      store_p<Traits>(smem, s, warp_m, warp_n, lane);
      BROADHEAD_UNROLL
      for (int chunk = 0; chunk < Traits::kVChunks; ++chunk) {
        const std::uint32_t stage = begin_step(Traits::kKChunks + chunk);
        pv_gemm<Traits>(o, addresses.p, stage + addresses.v, chunk, warp_n, params.head_dim_v);
      }
    } else {
      const std::uint32_t stage = begin_step(Traits::kKChunks);
      exp_pv_gemm<Traits>(o, s, softmax, scale.scale_log2, stage + addresses.v, params.head_dim_v, exp2);
    }
    if (paged && thread < Traits::kTileN) store_page(n_block + Traits::kAhead + 1, next_page);
  }

  cp_async_wait<0>();
  __syncthreads();
  write_tile<Traits>(params, smem, o, softmax, scale, !Traits::kPlainCall && state.splits > 1 ? split : -1, warp_m,
                     warp_n, lane);
}

}  // namespace broadhead::sm80
