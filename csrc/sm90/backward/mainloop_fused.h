// The consumers of the Hopper kernel that keeps keys and gives all three gradients.
//
// A step, of each warpgroup's 64 keys, and then of half the columns of dQ (128 keys); | waits for what it needs:
//
//   dP^T | P | dV += P^T dO | dS -> shared memory | dK += dS^T Q | both have stored dS | dQ = dS K, S^T of the next
//   step
//
// P is computed beside dP, and dQ goes to shared memory beside S of the next step. Nothing is on its way from one round
// of the loop to the next: ptxas would make every product wait for the one before.
#pragma once

#include "sm90/backward/mainloop_keys.h"
#include "sm90/stmatrix.h"

namespace broadhead::sm90 {

using namespace tma;

constexpr int kScoresBarrier = 3;  // dS of a step is in shared memory; what lay there two steps ago has been read

template <class Traits>
struct FusedConsumer : KeyConsumer<Traits> {
  using Base = KeyConsumer<Traits>;
  using Base::smem, Base::ring, Base::warpgroup;
  using typename Base::Element, typename Base::FirstCols, typename Base::SecondCols;
  using Layout = typename Traits::ScoreLayout;

  // Lane l gives the address of row l % 8 of matrix l / 8: of 16 queries and 16 keys, those of keys side by side.
  BROADHEAD_DEVICE std::uint32_t store_address(int buffer) const {
    const int thread = fresh_thread();
    const int row = thread % 8, matrix = thread / 8 % 4;
    const int query = matrix / 2 * 8 + row, chunk = thread / 32 % 4 * 2 + matrix % 2;
    return smem_address(smem.ds[buffer]) + warpgroup * Layout::kSubtileStride + query * Layout::kRowBytes +
           (chunk ^ row) * 16;
  }

  BROADHEAD_DEVICE void store_ds(const Weights<Traits>& ds, int buffer) const {
    const std::uint32_t address = store_address(buffer);
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kWeightSteps; ++step) {
      stmatrix_x4_trans(address + step * 16 * Layout::kRowBytes, ds[step]);
    }
    cutlass::arch::fence_view_async_shared();
  }

  BROADHEAD_DEVICE void issue_dq(float (&dq)[Traits::kDqTiles][4], int buffer) const {
    using Rows = typename Traits::FirstRows;
    constexpr int kColBytes = Traits::kDqCols * static_cast<int>(sizeof(Element));
    const int first =
        Traits::kDqCols >= 64 ? warpgroup * (Traits::kDqCols / 64) * Rows::kSubtileStride : warpgroup * kColBytes;
    const std::uint64_t a =
        MatrixDescriptor<Layout::kRowBytes>::make(smem_address(smem.ds[buffer]), 0, Layout::kSlabStride);
    const std::uint64_t b = MatrixDescriptor<Rows::kRowBytes>::make(smem_address(smem.first_rows) + first,
                                                                    Rows::kSubtileStride, Rows::kSlabStride);
    clear_accumulators(dq);
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kRows / 16; ++step) {
      wgmma_ss<Element, Traits::kDqCols, Major::MN>(dq, a + (Layout::step_offset(step, Layout::kSubtileStride) >> 4),
                                                    b + (step * 2 * Rows::kSlabStride >> 4), step > 0);
    }
    cute::warpgroup_commit_batch();
    fence_registers(dq);
  }

  BROADHEAD_DEVICE void store_dq(const float (&dq)[Traits::kDqTiles][4], std::uint32_t parity) const {
    barrier_wait(smem.dq_empty[warpgroup], parity ^ 1);
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kDqTiles; ++n) {
      smem.dq[warpgroup][n * 128 + fresh_thread() % 128] = make_float4(dq[n][0], dq[n][1], dq[n][2], dq[n][3]);
    }
    cutlass::arch::fence_view_async_shared();
    release(smem.dq_full[warpgroup]);
  }

  // A step whose S is there. Ends with S of the next step, unless it is the last.
  template <bool kLast>
  BROADHEAD_DEVICE void step(float (&dk)[Traits::kHeadDim / 8][4], float (&dv)[Traits::kHeadDimV / 8][4],
                             Scores<Traits>& s, int query0, std::uint32_t parity) {
    Scores<Traits> dp;
    Weights<Traits> p, ds;
    Base::wait_second();
    // With a softcap P takes the registers of dP.
    if constexpr (!Traits::kCapped) Base::issue_dp(dp);
    Base::compute_p(s, p, query0);
    if constexpr (Traits::kCapped) Base::issue_dp(dp);
    issue_gradient<SecondCols>(dv, p, smem.second_cols[ring.stage()]);
    cute::warpgroup_wait<1>();
    fence_registers(dp);
    Base::compute_ds(ds, [&](int n) { return make_float4(s[n][0], s[n][1], s[n][2], s[n][3]); }, dp, query0);
    store_ds(ds, parity);
    cute::warpgroup_wait<0>();  // dV: frees the registers of P
    fence_registers(dv);
    fence_registers(p);
    issue_gradient<FirstCols>(dk, ds, smem.first_cols[ring.stage()]);
    NamedBarrier::sync(256, hardware_id(kScoresBarrier));
    float dq[Traits::kDqTiles][4];
    issue_dq(dq, parity);
    cute::warpgroup_wait<1>();  // dK: S has no registers before
    fence_registers(dk);
    fence_registers(ds);
    const auto done = ring;
    if constexpr (!kLast) {
      ring.advance();
      Base::wait_queries();
      Base::issue_s(s);
    }
    release(smem.first_empty[done.stage()]);
    release(smem.second_empty[done.stage()]);
    cute::warpgroup_wait<kLast ? 0 : 1>();
    fence_registers(dq);
    store_dq(dq, parity);
    if constexpr (!kLast) {
      cute::warpgroup_wait<0>();
      fence_registers(s);
    }
  }

  BROADHEAD_DEVICE void run() {
    if (Base::has_steps()) {
      barrier_wait(smem.rows_full[0], 0);
      barrier_wait(smem.rows_full[1], 0);
      barrier_wait(smem.keys_ready, 0);
    }
    float dk[Traits::kHeadDim / 8][4], dv[Traits::kHeadDimV / 8][4];
    clear_accumulators(dk);
    clear_accumulators(dv);
    if (Base::has_steps()) {
      const BackwardWork& work = smem.work;
      Scores<Traits> s;
      std::uint32_t parity = 0;
      int tile = work.range.begin;
      Base::wait_queries();
      Base::issue_s(s);
      cute::warpgroup_wait<0>();
      fence_registers(s);
      for (int left = (work.range.end - tile) * work.heads; left > 1; --left) {
        step<false>(dk, dv, s, tile * Traits::kCols, parity);
        parity ^= 1;
        if (++tile == work.range.end) tile = work.range.begin;
      }
      step<true>(dk, dv, s, tile * Traits::kCols, parity);
    }
    Base::write_dk(dk);
    Base::write_dv(dv);
  }
};

}  // namespace broadhead::sm90
