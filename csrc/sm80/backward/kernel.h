// The portable backward kernel: one tile of keys (dK and dV) or of queries (dQ) a CTA.
//
// Every step waits for a tile of the side that streams by, meets the other warps once, fetches the tile behind it and
// multiplies. Sums are made by one CTA in one order, so that results are the same in every run.
#pragma once

#include "common/accumulator.h"
#include "sm80/backward/epilogue.h"
#include "sm80/backward/load.h"
#include "sm80/backward/mainloop.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// CTAs of neighbouring indices work on different heads of the same tile. Under a causal mask the longest come first:
// the first keys, the last queries.
template <class Traits, Side kSide>
BROADHEAD_DEVICE void set_backward_state(BackwardState& state, const AttnBwdParams& params, int index, int tiles) {
  const int heads = kSide == Side::kKeys ? params.num_heads_kv : params.num_heads_q;
  const int group = params.num_heads_q / params.num_heads_kv;
  const int tile = index / (heads * params.batch);
  const int rest = index - tile * heads * params.batch;
  const int batch = rest / heads;
  const int head = rest - batch * heads;
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  const AttentionMask mask{seqlen.seqlen_q,        seqlen.seqlen_k,
                           params.window_left,     params.window_right,
                           params.attention_chunk, sequence_prefix(params, batch, seqlen.seqlen_k)};
  state.seqlen = seqlen;
  state.mask = mask;
  state.scale.set(params.softmax_scale, params.softcap);
  state.head = head;
  state.rows = {{0, kSide == Side::kKeys ? seqlen.seqlen_k : seqlen.seqlen_q}, 0};
  if constexpr (kSide == Side::kKeys) {
    state.first_row = tile * Traits::kRows;
    state.end_row = seqlen.seqlen_k;
    const QueryInterval seen =
        mask.query_interval(state.first_row, min_int(state.first_row + Traits::kRows, seqlen.seqlen_k) - 1);
    state.cols = {{seen.begin, min_int(seen.end, seqlen.seqlen_q)}, 0};
    state.begin = state.cols.interval.begin / Traits::kCols;
    state.end = ceil_div(state.cols.interval.end, Traits::kCols);
    state.first_head = head * group;
    state.heads = group;
  } else {
    state.first_row = (tiles - 1 - tile) * Traits::kRows;
    state.end_row = seqlen.seqlen_q;
    const int last_row = min_int(state.first_row + Traits::kRows, seqlen.seqlen_q) - 1;
    const BlockRange range = block_range(mask, state.first_row, last_row, Traits::kCols);
    state.cols = {mask.tile_interval(state.first_row, last_row), mask.prefix_len};
    state.begin = range.begin;
    state.end = range.end;
    state.first_head = head;
    state.heads = 1;
  }
}

template <class Traits, Side kSide>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    backward_kernel(const __grid_constant__ AttnBwdParams params, const int tiles) {
  using Element = typename Traits::Element;
  constexpr bool kKeys = kSide == Side::kKeys;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);

  // ---- which work
  const int thread = threadIdx.x;
  const BackwardState& state = smem.state;
  if (thread == 0) set_backward_state<Traits, kSide>(smem.state, params, blockIdx.x, tiles);
  __syncthreads();
  if (state.first_row >= state.end_row) return;
  const int per_head = max_int(state.end - state.begin, 0);
  const int steps = per_head * state.heads;
  const int group = params.num_heads_q / params.num_heads_kv;
  const int kv_head = kKeys ? state.head : state.head / group;
  const int columns = params.head_dim, columns_v = params.head_dim_v;

  // ---- copies
  const auto queries = [&](const void* tensor, const TensorStrides& strides, int head, int cols) {
    return query_rows<Element>(tensor, strides, state.seqlen, head, kKeys ? state.cols : state.rows, cols);
  };
  const auto keys = [&](const void* tensor, const TensorStrides& strides, int cols) {
    return key_rows<Element>(tensor, strides, state.seqlen, kv_head, kKeys ? state.rows : state.cols, cols);
  };
  if (steps > 0) {
    copy_rows<Traits, Traits::kRows>(
        smem.first,
        kKeys ? keys(params.k, params.k_strides, columns) : queries(params.q, params.q_strides, state.head, columns),
        state.first_row);
    copy_rows<Traits, Traits::kRows>(smem.second,
                                     kKeys ? keys(params.v, params.v_strides, columns_v)
                                           : queries(params.dout, params.dout_strides, state.head, columns_v),
                                     state.first_row);
  }
  // The step whose columns are copied next: its number, its tile of columns and its query head.
  int next_step = 0, next_tile = state.begin, next_head = state.first_head;
  const auto issue = [&] {
    if (next_step < steps) {
      const int stage = next_step % Traits::kStages;
      const int first_col = next_tile * Traits::kCols;
      copy_rows<Traits, Traits::kCols>(
          smem.stream_first[stage],
          kKeys ? queries(params.q, params.q_strides, next_head, columns) : keys(params.k, params.k_strides, columns),
          first_col);
      copy_rows<Traits, Traits::kCols>(smem.stream_second[stage],
                                       kKeys ? queries(params.dout, params.dout_strides, next_head, columns_v)
                                             : keys(params.v, params.v_strides, columns_v),
                                       first_col);
      if (kKeys && thread < Traits::kCols) {
        smem.stats[stage][thread] = load_stats(params, state.seqlen, next_head, first_col + thread);
      }
      ++next_step;
      if (++next_tile == state.end) {
        next_tile = state.begin;
        ++next_head;
      }
    }
    cute::cp_async_fence();
  };
  BROADHEAD_UNROLL
  for (int i = 0; i < Traits::kStages - 1; ++i) issue();

  // ---- warp state
  const int warp = thread / 32;
  const WarpPlace place{thread % 32, warp / Traits::kWarpsC, warp % Traits::kWarpsC};
  float2 row_stats[kKeys ? 1 : 2 * Traits::kRowTiles];
  if constexpr (!kKeys) {
    BROADHEAD_UNROLL
    for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
      const int row = state.first_row + tile_row<Traits>(place, i / 2, i % 2 * 2);
      row_stats[i] = load_stats(params, state.seqlen, state.head, row);
    }
  }
  Gradient<Traits> of_first;  // dK, or dQ
  clear_accumulators(of_first);
  float of_second[Traits::kRowTiles][kKeys ? Traits::kOutTiles : 1][4];  // dV
  clear_accumulators(of_second);

  // ---- steps
  int tile = state.begin;
  for (int step = 0; step < steps; ++step) {
    if constexpr (Traits::kStages == 1) {
      if (step > 0) __syncthreads();  // all have read the stage
      issue();
    }
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (Traits::kStages == 2) issue();
    const int stage = step % Traits::kStages;
    const void* first = smem.stream_first[stage];
    const void* second = smem.stream_second[stage];

    Scores<Traits> s, dp;
    multiply_rows<Traits>(s, smem.first, first, place, columns);
    multiply_rows<Traits>(dp, smem.second, second, place, columns_v);
    const StepMask mask = make_step_mask<Traits, kSide>(state, tile * Traits::kCols);
    differentiate_scores<Traits, kSide>(s, dp, mask, state.scale, place, [&](int i) {
      if constexpr (kKeys) return smem.stats[stage][tile_col<Traits>(place, i / 2) + i % 2];
      if constexpr (!kKeys) return row_stats[i];
    });
    if (++tile == state.end) tile = state.begin;

    constexpr int kFirstOfDs = kKeys ? Traits::kCols : 0;
    if constexpr (Traits::kExchange) {
      if (kKeys) store_exchange<Traits>(smem.exchange, s, 0, place);
      store_exchange<Traits>(smem.exchange, dp, kFirstOfDs, place);
      named_barrier_sync(1 + place.warp_r, 32 * Traits::kWarpsC);
    }
    if constexpr (kKeys) add_gradient<Traits>(of_second, s, smem.exchange, 0, second, place, columns_v);
    add_gradient<Traits>(of_first, dp, smem.exchange, kFirstOfDs, first, place, columns);
  }

  if constexpr (kKeys) {
    write_gradient<Traits>(of_first, params.softmax_scale, target_of(keys(params.dk, params.dk_strides, columns)),
                           state.first_row, place);
    write_gradient<Traits>(of_second, 1.f, target_of(keys(params.dv, params.dv_strides, columns_v)), state.first_row,
                           place);
  } else {
    write_gradient<Traits>(of_first, params.softmax_scale,
                           target_of(queries(params.dq, params.dq_strides, state.head, columns)), state.first_row,
                           place);
  }
}

}  // namespace broadhead::sm80
