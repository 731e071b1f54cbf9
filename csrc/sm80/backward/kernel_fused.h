// The portable backward kernel that gives dK, dV and dQ: one tile of keys a CTA.
//
// dQ of a step is computed and added in the step after it, by the second role while the first one is at P, and by the
// first one while the second is at dS. So a step has one barrier of all warps. The additions have no order.
#pragma once

#include "sm80/backward/kernel.h"
#include "sm80/backward/mainloop_fused.h"

namespace broadhead::sm80 {

// Which step a CTA is at: tiles of queries of one query head after the other.
struct QueryStep {
  int tile;
  int head;

  BROADHEAD_DEVICE QueryStep after(const BackwardState& state) const {
    return tile + 1 == state.end ? QueryStep{state.begin, head + 1} : QueryStep{tile + 1, head};
  }
  BROADHEAD_DEVICE QueryStep before(const BackwardState& state) const {
    return tile == state.begin ? QueryStep{state.end - 1, head - 1} : QueryStep{tile - 1, head};
  }
};

// All threads: Q, dO, LSE and D of a step into `stage`.
template <class Traits>
BROADHEAD_DEVICE void copy_step(const AttnBwdParams& params, typename Traits::SharedStorage& smem, int stage,
                                const QueryStep& step) {
  using Element = typename Traits::Element;
  const BackwardState& state = smem.state;
  const auto copy = [&](const void* target, const void* base, const TensorStrides& strides, int columns) {
    copy_rows<Traits, Traits::kCols>(target,
                                     RowSource<Element>{static_cast<const Element*>(base) + step.head * strides.head,
                                                        strides.row, state.cols, columns, &state.given_lse, step.head},
                                     step.tile * Traits::kCols);
  };
  copy(smem.stream_first[stage], state.stream_first, params.q_strides, params.head_dim);
  copy(smem.stream_second[stage], state.stream_second, params.dout_strides, params.head_dim_v);
  copy_stats<Traits::kCols>(smem.lse[stage], smem.delta[stage], state.lse + step.head * params.lse_head_stride,
                            state.delta + step.head * params.total_q, step.tile * Traits::kCols, state.seqlen.seqlen_q);
}

// The products of a step but for dQ: `gradient` is dV or dK.
template <class Traits>
BROADHEAD_DEVICE void fused_step(Gradient<Traits>& gradient, typename Traits::SharedStorage& smem, int stage,
                                 int parity, int first_col, int columns, int columns_v) {
  const auto here = [] { return warp_place<Traits>(fresh_thread()); };  // in each part, for want of registers
  const bool is_second = here().role != 0;
  auto* handed = reinterpret_cast<uint4*>(smem.ds[parity]);
  const std::uint32_t rows = smem_address(is_second ? smem.second : smem.first);
  const std::uint32_t first = smem_address(smem.stream_first[stage]);
  const std::uint32_t second = smem_address(smem.stream_second[stage]);

  Scores<Traits> s;
  Weights<Traits> weights;
  {
    const WarpPlace place = here();
    const auto load = [&](RowFragments<Traits>& a, int step) { load_rows<Traits>(a, rows, place, step); };
    multiply_rows<Traits>(s, load, is_second ? second : first, place, is_second ? columns_v : columns);
  }
  if (!is_second) {
    const WarpPlace place = here();
    with_found_mask<Traits>(smem, first_col, place, [&](const auto& step_mask) {
      with_softcap(smem.state, [&](const auto& weigh) {
        weigh_scores<Traits>(
            s, step_mask, weigh, smem.lse[stage], handed,
            [&](int m, int n, const std::uint32_t (&p)[4]) {
              if constexpr (Traits::kShares) {
                OwnFragment<Traits>::store(smem.shared_p, place, m, n, p);
              } else {
                BROADHEAD_UNROLL
                for (int i = 0; i < 4; ++i) weights[m][n / 2][i] = p[i];
              }
            },
            place);
      });
    });
    named_barrier_arrive(hand_over_barrier(place.warp_r), 64 * Traits::kWarpsC);
    if (Traits::kShares) named_barrier_sync(shared_p_barrier(place.warp_r), 32 * Traits::kWarpsC);
  } else {
    const WarpPlace place = here();
    named_barrier_sync(hand_over_barrier(place.warp_r), 64 * Traits::kWarpsC);
    with_found_mask<Traits>(smem, first_col, place, [&](const auto& step_mask) {
      differentiate_and_store<Traits>(s, weights, step_mask, smem.delta[stage], handed, place);
    });
    if (Traits::kShares) named_barrier_sync(shared_ds_barrier(place.warp_r), 32 * Traits::kWarpsC);
  }
  const WarpPlace place = here();
  if constexpr (Traits::kShares) {
    if (is_second) {
      add_gradient<Traits>(gradient, shared_ds<Traits>(smem_address(handed), place), first, place, columns);
    } else {
      add_gradient<Traits>(gradient, own_weights<Traits>(s, smem.shared_p, place), second, place, columns_v);
    }
  } else {
    add_gradient<Traits>(gradient, kept_weights<Traits>(weights), is_second ? first : second, place,
                         is_second ? columns : columns_v);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    fused_kernel(const __grid_constant__ AttnBwdParams params, const int tiles, float* dq_sums) {
  using Element = typename Traits::Element;
  using DqSums = typename Traits::DqSums;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);

  // ---- which work
  const int thread = threadIdx.x;
  const BackwardState& state = smem.state;
  if (thread == 0) {
    set_backward_state<Traits>(smem.state, params, blockIdx.x, tiles);
    smem.dq_sums = dq_sums_of<DqSums>(dq_sums, params, smem.state.seqlen, smem.state.batch, 0);
  }
  __syncthreads();
  if (state.first_row >= state.end_row) return;
  find_seen<Traits>(smem);
  const int columns = params.head_dim, columns_v = params.head_dim_v;
  const auto keys = [&](const void* tensor, const TensorStrides& strides, int cols) {
    return key_rows<Element>(tensor, strides, state.seqlen, state.kv_head, state.rows, cols);
  };

  Gradient<Traits> gradient;  // dV or dK
  clear_accumulators(gradient);
  if (state.begin < state.end) {
    // ---- copies
    copy_rows<Traits, Traits::kRows>(smem.first, keys(params.k, params.k_strides, columns), state.first_row);
    copy_rows<Traits, Traits::kRows>(smem.second, keys(params.v, params.v_strides, columns_v), state.first_row);
    const auto exists = [&](const QueryStep& step) { return step.head < state.first_head + state.heads; };
    const auto issue = [&](const QueryStep& step, int stage) {
      if (exists(step)) copy_step<Traits>(params, smem, stage, step);
      cute::cp_async_fence();
    };
    QueryStep step{state.begin, state.first_head};
    if constexpr (Traits::kStages == 2) issue(step, 0);

    // ---- steps
    int parity = 0;  // of the step
    const auto add_dq_of = [&](const QueryStep& of, int of_parity) {
      const std::int64_t tile = of.head * dq_tiles(params, DqSums::kRows);
      float* sums = smem.dq_sums + tile * (DqSums::kRows * DqSums::kColumns) +
                    static_cast<std::int64_t>(of.tile) * (Traits::kCols * DqSums::kColumns);
      add_dq<Traits>(smem_address(smem.ds[of_parity]), smem_address(smem.first), sums, fresh_thread());
    };
    for (bool is_first = true; exists(step); is_first = false) {
      if constexpr (Traits::kStages == 1) {
        if (!is_first) __syncthreads();  // all have read the stage
        issue(step, 0);
      }
      const int stage = Traits::kStages == 2 ? parity : 0;
      cp_async_wait<0>();
      __syncthreads();
      if constexpr (Traits::kStages == 2) issue(step.after(state), parity ^ 1);
      // Computed where it is needed, for want of registers.
      const auto here = [] { return warp_place<Traits>(fresh_thread()); };
      if (!is_first && here().role == 1) add_dq_of(step.before(state), parity ^ 1);
      fused_step<Traits>(gradient, smem, stage, parity, step.tile * Traits::kCols, columns, columns_v);
      if (!is_first && here().role == 0) add_dq_of(step.before(state), parity ^ 1);
      step = step.after(state);
      parity ^= 1;
    }
    __syncthreads();
    add_dq_of(step.before(state), parity ^ 1);
  }

  // ---- gradients
  const WarpPlace place = warp_place<Traits>(fresh_thread());
  const auto target = [&](void* tensor, const TensorStrides& strides, int cols) {
    RowTarget<Element> rows = target_of(keys(tensor, strides, cols));
    rows.end_row = state.end_row;  // keys that nobody sees have gradients of 0
    return rows;
  };
  if (place.role == 0) {
    write_gradient<Traits>(gradient, 1.f, target(params.dv, params.dv_strides, columns_v), state.first_row, place);
  } else {
    write_gradient<Traits>(gradient, params.softmax_scale, target(params.dk, params.dk_strides, columns),
                           state.first_row, place);
  }
}

}  // namespace broadhead::sm80
