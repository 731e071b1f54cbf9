// The portable backward kernel: one tile of keys (dK and dV) or of queries (dQ) a CTA.
//
// Every step waits for a tile of the side that streams by, meets the other warps, fetches the tile behind it and
// multiplies. Sums are made by one CTA in one order, so that results are the same in every run.
#pragma once

#include <climits>

#include "common/accumulator.h"
#include "sm80/backward/epilogue.h"
#include "sm80/backward/load.h"
#include "sm80/backward/mainloop.h"
#include "sm80/backward/scores.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// Queries that every key of key_first..key_last (inclusive) is seen by. Those behind the last one count as well: their
// dO and D are 0. So do keys that do not exist: nobody reads what their gradients become.
BROADHEAD_DEVICE KeyInterval whole_queries(const AttentionMask& mask, int key_first, int key_last) {
  const int first = max_int(key_first, mask.prefix_len);  // the prefix is seen by all
  if (first > key_last) return {0, INT_MAX};
  // Both ends never decrease as the key grows.
  const int end = mask.query_interval(first, first).end;
  return {mask.query_interval(key_last, key_last).begin, end == mask.seqlen_q ? INT_MAX : end};
}

// CTAs of neighbouring indices work on different heads of the same tile. Under a causal mask the longest come first:
// the first keys, the last queries.
template <class Traits>
BROADHEAD_DEVICE void set_backward_state(BackwardState& state, const AttnBwdParams& params, int index, int tiles) {
  using Element = typename Traits::Element;
  const int heads = Traits::kKeys ? params.num_heads_kv : params.num_heads_q;
  const int group = params.heads_per_kv;
  const int tile = index / (heads * params.batch);
  const int rest = index - tile * heads * params.batch;
  const int batch = rest / heads;
  const int head = rest - batch * heads;
  const SeqlenInfo seqlen = make_seqlen_info(params, batch);
  AttentionMask mask{seqlen.seqlen_q, seqlen.seqlen_k, params.mask_rule,
                     sequence_prefix(params, batch, seqlen.seqlen_k)};
  MaskExtents extents;
  if (gives_masks(params)) {
    mask.give(params.sequence_masks[batch]);
    extents = params.sequence_masks[batch].extents;
  }
  state.seqlen = seqlen;
  state.mask = mask;
  state.scale.set(params.softmax_scale, params.softcap);
  state.inverse_softcap = params.softcap > 0.f ? 1.f / state.scale.softcap : 0.f;
  state.lse = params.softmax_lse + seqlen.batch_q * params.lse_batch_stride + seqlen.row_q;
  state.delta = params.delta + seqlen.batch_q * static_cast<std::int64_t>(params.seqlen_q) + seqlen.row_q;
  state.batch = batch;
  state.head = head;
  state.kv_head = Traits::kKeys ? head : kv_head_of(params, head);
  state.rows = {{0, Traits::kKeys ? seqlen.seqlen_k : seqlen.seqlen_q}, 0};
  if constexpr (Traits::kKeys) {
    state.first_row = tile * Traits::kRows;
    state.end_row = seqlen.seqlen_k;
    // A dS of 0 does not hide keys that no query sees from dQ.
    if (Traits::kFused) {
      const KeyInterval given{0, mask.kind != Given::kNone ? seqlen.seqlen_k : 0};
      state.rows = {mask.tile_interval(0, seqlen.seqlen_q - 1), mask.prefix_len, given, extents.of_keys};
    }
    const int last_row = min_int(state.first_row + Traits::kRows, seqlen.seqlen_k) - 1;
    const QueryInterval seen = mask.query_interval(state.first_row, last_row);
    const QueryInterval given = given_queries(mask, extents, state.first_row, last_row);
    state.given_queries = given;
    state.cols = {{seen.begin, min_int(seen.end, seqlen.seqlen_q)}, 0, {given.begin, given.end}};
    state.given_lse = {given.begin < given.end ? state.lse : nullptr, params.lse_head_stride};
    state.whole = whole_queries(mask, state.first_row, last_row);
    // Keys that do not exist have no P: where an LSE is low that of a score of 0 may be infinite.
    if (Traits::kFused && state.first_row + Traits::kRows > seqlen.seqlen_k) state.whole = {0, 0};
    state.stream_first = query_rows<Element>(params.q, params.q_strides, seqlen, 0, state.cols, 0).base;
    state.stream_second = query_rows<Element>(params.dout, params.dout_strides, seqlen, 0, state.cols, 0).base;
    const KeyInterval meets = hull(state.cols.interval, state.cols.given);
    state.begin = meets.begin / Traits::kCols;
    state.end = ceil_div(meets.end, Traits::kCols);
    state.first_head = head * group;
    state.heads = group;
  } else {
    state.first_row = (tiles - 1 - tile) * Traits::kRows;
    state.end_row = seqlen.seqlen_q;
    const int last_row = min_int(state.first_row + Traits::kRows, seqlen.seqlen_q) - 1;
    const KeyInterval given = given_interval(mask, extents, state.first_row, last_row);
    narrow_given(state.mask, given);
    const BlockRange range = block_range(mask, state.first_row, last_row, Traits::kCols, given);
    state.cols = {mask.tile_interval(state.first_row, last_row), mask.prefix_len, given, extents.of_keys};
    state.whole = mask.unmasked_interval(state.first_row, last_row);
    state.stream_first = key_rows<Element>(params.k, params.k_strides, seqlen, state.kv_head, state.cols, 0).base;
    state.stream_second = key_rows<Element>(params.v, params.v_strides, seqlen, state.kv_head, state.cols, 0).base;
    state.begin = range.begin;
    state.end = range.end;
    state.given_lse = {nullptr, 0};
    state.first_head = head;
    state.heads = 1;
  }
}

// What the warps of row group `warp_r` meet at: the second role waits for P of the first one; the warps of a role that
// share P, and those that share dS, wait for each other.
BROADHEAD_DEVICE int hand_over_barrier(int warp_r) { return 1 + 3 * warp_r; }
BROADHEAD_DEVICE int shared_p_barrier(int warp_r) { return 2 + 3 * warp_r; }
BROADHEAD_DEVICE int shared_ds_barrier(int warp_r) { return 3 + 3 * warp_r; }

// One step of a warp with two roles: `gradient` is its dV or dK.
template <class Traits>
BROADHEAD_DEVICE void step_of_role(Gradient<Traits>& gradient, typename Traits::SharedStorage& smem, int stage,
                                   int first_col, const WarpPlace& place, int columns, int columns_v) {
  constexpr int kSet = Traits::kRows / 16 * (Traits::kCols / 16) * 32;
  const bool is_second = place.role != 0;
  uint4* shared = smem.fragments;
  uint4* handed = smem.fragments + (Traits::kShares ? kSet : 0);
  const std::uint32_t rows = smem_address(is_second ? smem.second : smem.first);
  const std::uint32_t first = smem_address(smem.stream_first[stage]);
  const std::uint32_t second = smem_address(smem.stream_second[stage]);
  const auto load = [&](RowFragments<Traits>& a, int step) { load_rows<Traits>(a, rows, place, step); };

  Scores<Traits> s;
  multiply_rows<Traits>(s, load, is_second ? second : first, place, is_second ? columns_v : columns);
  if (!is_second) {
    with_mask<Traits>(smem.state, first_col, place, [&](const auto& step_mask) {
      with_softcap(smem.state, [&](const auto& weigh) {
        weigh_scores<Traits>(
            s, step_mask, weigh, smem.lse[stage], handed,
            [&](int m, int n, const auto& p) {
              if constexpr (Traits::kShares) OwnFragment<Traits>::store(shared, place, m, n, p);
            },
            place);
      });
    });
    named_barrier_arrive(hand_over_barrier(place.warp_r), 64 * Traits::kWarpsC);
    if (Traits::kShares) named_barrier_sync(shared_p_barrier(place.warp_r), 32 * Traits::kWarpsC);
  } else {
    named_barrier_sync(hand_over_barrier(place.warp_r), 64 * Traits::kWarpsC);
    with_mask<Traits>(smem.state, first_col, place, [&](const auto& step_mask) {
      differentiate_scores<Traits>(s, step_mask, smem.delta[stage], handed, place);
    });
    if (Traits::kShares) named_barrier_sync(shared_ds_barrier(place.warp_r), 32 * Traits::kWarpsC);
  }
  add_gradient<Traits>(gradient, own_weights<Traits>(s, is_second ? handed : shared, place), is_second ? first : second,
                       place, is_second ? columns : columns_v);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    backward_kernel(const __grid_constant__ AttnBwdParams params, const int tiles) {
  using Element = typename Traits::Element;
  constexpr bool kKeys = Traits::kKeys;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);

  // ---- which work
  const int thread = threadIdx.x;
  const BackwardState& state = smem.state;
  if (thread == 0) set_backward_state<Traits>(smem.state, params, blockIdx.x, tiles);
  __syncthreads();
  if (state.first_row >= state.end_row) return;
  const int per_head = max_int(state.end - state.begin, 0);
  const int steps = per_head * state.heads;
  const int columns = params.head_dim, columns_v = params.head_dim_v;

  // ---- copies
  const auto queries = [&](const void* tensor, const TensorStrides& strides, int head, int cols) {
    return query_rows<Element>(tensor, strides, state.seqlen, head, kKeys ? state.cols : state.rows, cols);
  };
  const auto keys = [&](const void* tensor, const TensorStrides& strides, int cols) {
    return key_rows<Element>(tensor, strides, state.seqlen, state.kv_head, kKeys ? state.rows : state.cols, cols);
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
    if constexpr (!kKeys) {
      copy_stats<Traits::kRows>(smem.lse[0], smem.delta[0], state.lse + state.head * params.lse_head_stride,
                                state.delta + state.head * params.total_q, state.first_row, state.end_row);
    }
  }
  // Q or K, and dO or V, of a step.
  const auto copy_first = [&](int stage, int tile, int head) {
    const auto& strides = kKeys ? params.q_strides : params.k_strides;
    const auto* base = static_cast<const Element*>(state.stream_first) + (kKeys ? head * strides.head : 0);
    copy_rows<Traits, Traits::kCols>(smem.stream_first[stage],
                                     RowSource<Element>{base, strides.row, state.cols, columns, &state.given_lse, head},
                                     tile * Traits::kCols);
  };
  const auto copy_second = [&](int stage, int tile, int head) {
    const auto& strides = kKeys ? params.dout_strides : params.v_strides;
    const auto* base = static_cast<const Element*>(state.stream_second) + (kKeys ? head * strides.head : 0);
    copy_rows<Traits, Traits::kCols>(
        smem.stream_second[stage], RowSource<Element>{base, strides.row, state.cols, columns_v, &state.given_lse, head},
        tile * Traits::kCols);
  };
  // What is copied next: into which stage, which tile of columns, of which query head.
  int next_stage = 0, next_tile = state.begin, next_head = state.first_head;
  const auto issue = [&] {
    if (next_head < state.first_head + state.heads && per_head > 0) {
      copy_second(next_stage, next_tile, next_head);
      if constexpr (!Traits::kRefillsApart) copy_first(next_stage, next_tile, next_head);
      if constexpr (kKeys) {
        copy_stats<Traits::kCols>(
            smem.lse[next_stage], smem.delta[next_stage], state.lse + next_head * params.lse_head_stride,
            state.delta + next_head * params.total_q, next_tile * Traits::kCols, state.seqlen.seqlen_q);
      }
      if (++next_tile == state.end) {
        next_tile = state.begin;
        ++next_head;
      }
    }
    if constexpr (Traits::kStages == 2) next_stage ^= 1;
    cute::cp_async_fence();
  };
  if constexpr (Traits::kStages == 2 || Traits::kRefillsApart) issue();

  // ---- warp state
  RowFragments<Traits> kept[Traits::kRowsInRegisters ? 2 : 1][Traits::kRowsInRegisters ? Traits::kHeadDim / 16 : 1];
  if constexpr (Traits::kRowsInRegisters) {
    cp_async_wait<0>();
    __syncthreads();
    const WarpPlace place = warp_place<Traits>(thread);
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      load_rows<Traits>(kept[0][step], smem_address(smem.first), place, step);
      load_rows<Traits>(kept[1][step], smem_address(smem.second), place, step);
    }
  }
  // Operands of `first` or `second`.
  const auto rows = [&](auto is_second, const WarpPlace& place) {
    return [&, place](RowFragments<Traits>& a, int step) {
      if constexpr (Traits::kRowsInRegisters) {
        BROADHEAD_UNROLL
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          BROADHEAD_UNROLL
          for (int i = 0; i < 4; ++i) a[m][i] = kept[is_second][step][m][i];
        }
      } else {
        load_rows<Traits>(a, smem_address(is_second ? smem.second : smem.first), place, step);
      }
    };
  };

  Gradient<Traits> gradient;  // dQ, or dV or dK
  clear_accumulators(gradient);

  // ---- steps
  int tile = state.begin;
  for (int left = steps; left > 0; --left) {
    if constexpr (Traits::kStages == 1 && !Traits::kRefillsApart) {
      if (left < steps) __syncthreads();  // all have read the stage
      issue();
    }
    const int stage = Traits::kStages == 2 ? next_stage ^ 1 : 0;
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (Traits::kStages == 2) issue();
    if constexpr (Traits::kRefillsApart) {
      copy_first(0, tile, state.head);
      cute::cp_async_fence();
    }
    const int first_col = tile * Traits::kCols;
    if (++tile == state.end) tile = state.begin;
    // Computed where it is needed, for want of registers.
    const auto here = [] { return warp_place<Traits>(fresh_thread()); };
    if constexpr (kKeys) {
      step_of_role<Traits>(gradient, smem, stage, first_col, here(), columns, columns_v);
    } else {
      const std::uint32_t first = smem_address(smem.stream_first[stage]);
      const std::uint32_t second = smem_address(smem.stream_second[stage]);
      Scores<Traits> s, dp;
      const WarpPlace in_dp = here();
      multiply_rows<Traits>(dp, rows(std::true_type{}, in_dp), second, in_dp, columns_v);
      if constexpr (Traits::kRefillsApart) {
        cp_async_wait<0>();
        __syncthreads();  // K is there, and all have read V
        issue();
      }
      const WarpPlace in_s = here();
      multiply_rows<Traits>(s, rows(std::false_type{}, in_s), first, in_s, columns);
      const WarpPlace place = here();
      const bool capped = state.scale.softcap > 0.f;
      if (capped) cap_scores<Traits>(s, dp, state, smem.delta[0], place);
      const float factor = capped ? kLog2e : state.scale.inner * kLog2e;
      with_mask<Traits>(state, first_col, place, [&](const auto& step_mask) {
        differentiate<Traits>(s, dp, step_mask, factor, smem.lse[0], smem.delta[0], place);
      });
      if constexpr (Traits::kShares) {
        share_fragments<Traits>(smem.fragments, dp, place);
        named_barrier_sync(shared_ds_barrier(place.warp_r), 32 * Traits::kWarpsC);
      }
      const WarpPlace in_dq = here();
      add_gradient<Traits>(gradient, own_weights<Traits>(dp, smem.fragments, in_dq), first, in_dq, columns);
    }
  }

  // ---- gradients
  const WarpPlace place = warp_place<Traits>(fresh_thread());
  const float scale = params.softmax_scale;
  if constexpr (!kKeys) {
    write_gradient<Traits>(gradient, scale, target_of(queries(params.dq, params.dq_strides, state.head, columns)),
                           state.first_row, place);
  } else {
    if (place.role == 0) {
      write_gradient<Traits>(gradient, 1.f, target_of(keys(params.dv, params.dv_strides, columns_v)), state.first_row,
                             place);
    } else {
      write_gradient<Traits>(gradient, scale, target_of(keys(params.dk, params.dk_strides, columns)), state.first_row,
                             place);
    }
  }
}

}  // namespace broadhead::sm80
