// The consumers of the Hopper kernel that keeps keys and gives all three gradients.
//
// A step, of each warpgroup's 64 keys, and then of its part of dQ (128 keys); | waits for what it needs:
//
//   S^T, dP^T | P | dS | dQ = dS K of the step before, dV += P^T dO, dK += dS^T Q; dS -> shared memory | dQ -> likewise
//
// P is computed beside dP, and dS and dQ are stored beside the three products. While one warpgroup computes, the other
// multiplies. dQ is one step late, so that they need not meet, and so that whoever reads dS finds it there long since.
// Nothing is on its way from one round of the loop to the next: ptxas would make every product wait for the one before.
#pragma once

#include "sm90/backward/mainloop_keys.h"
#include "sm90/stmatrix.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct FusedConsumer : KeyConsumer<Traits> {
  using Base = KeyConsumer<Traits>;
  using Base::smem, Base::ring, Base::warpgroup;
  using typename Base::Element, typename Base::FirstCols, typename Base::SecondCols;
  using Layout = typename Traits::ScoreLayout;

  // Lane l gives the address of row l % 8 of matrix l / 8: of 16 queries and 16 keys, those of keys side by side.
  BROADHEAD_DEVICE std::uint32_t store_address(int buffer) const {
    const unsigned thread = Base::thread();
    const unsigned row = thread % 8, matrix = thread / 8 % 4;
    const unsigned query = matrix / 2 * 8 + row, chunk = thread / 32 % 4 * 2 + matrix % 2;
    return smem_address(smem.ds[buffer]) + warpgroup * Layout::kSubtileStride + query * Layout::kRowBytes +
           (chunk ^ row) * 16;
  }

  BROADHEAD_DEVICE void store_ds(const Weights<Traits>& ds, int buffer) const {
    const std::uint32_t address = store_address(buffer);
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kWeightSteps; ++step) {
      stmatrix_x4_trans(address + step * 16 * Layout::kRowBytes, ds[step]);
    }
    release(smem.ds_full[buffer]);
  }

  BROADHEAD_DEVICE void issue_dq(float (&dq)[Traits::kDqTiles][4], int buffer) const {
    using Rows = typename Traits::FirstRows;
    constexpr int kColBytes = Traits::kDqCols * static_cast<int>(sizeof(Element));
    constexpr int kColStep = Traits::kDqCols >= 64 ? Traits::kDqCols / 64 * Rows::kSubtileStride : kColBytes;
    const int first_query = Traits::kDqByRows ? warpgroup * 64 * Layout::kRowBytes : 0;
    const int first_col = Traits::kDqByRows ? 0 : warpgroup * kColStep;
    const std::uint64_t a =
        MatrixDescriptor<Layout::kRowBytes>::make(smem_address(smem.ds[buffer]) + first_query, 0, Layout::kSlabStride);
    const std::uint64_t b = MatrixDescriptor<Rows::kRowBytes>::make(smem_address(smem.first_rows) + first_col,
                                                                    Rows::kSubtileStride, Rows::kSlabStride);
    clear_accumulators(dq);
    // Whoever reads dS orders what both warpgroups have written, and seen to be there, before wgmma. PERF: it is a step
    // old, so that there is nothing left to wait for.
    cutlass::arch::fence_view_async_shared();
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kRows / 16; ++step) {
      wgmma_ss<Element, Traits::kDqCols, Major::MN>(dq, a + (Layout::step_offset(step, Layout::kSubtileStride) >> 4),
                                                    b + (step * 2 * Rows::kSlabStride >> 4), step > 0);
    }
    cute::warpgroup_commit_batch();
    fence_registers(dq);
  }

  // Waits until both warpgroups have stored dS of step `count`.
  BROADHEAD_DEVICE void wait_ds(std::uint32_t count) const { barrier_wait(smem.ds_full[count & 1], count >> 1 & 1); }

  // Hands dQ of step `count` to the warp that adds it, and dS of the step back.
  BROADHEAD_DEVICE void store_dq(const float (&dq)[Traits::kDqTiles][4], std::uint32_t count) const {
    release(smem.ds_empty[count & 1]);
    barrier_wait(smem.dq_empty[warpgroup], count & 1 ^ 1);
    float4* const to = smem.dq[warpgroup] + Base::thread() % 128;
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kDqTiles; ++n) {
      to[n * 128] = make_float4(dq[n][0], dq[n][1], dq[n][2], dq[n][3]);
    }
    release(smem.dq_full[warpgroup]);
  }

  // Step `count`. In the first one dQ is of whatever lies in shared memory, and nobody gets it.
  BROADHEAD_DEVICE void step(float (&dk)[Traits::kHeadDim / 8][4], float (&dv)[Traits::kHeadDimV / 8][4],
                             const typename Base::KeptK& k, const typename Base::KeptV& v,
                             const typename Base::Uniform& uniform, int query0, std::uint32_t count) {
    Weights<Traits> p, ds;
    Base::compute_weights(p, ds, k, v, uniform, query0);
    // Addresses of the buffers of dS are those of the stage in other words: the compiler should not keep them till now.
    asm volatile("" : "+r"(count));
    wait_ds(count - 1);
    float dq[Traits::kDqTiles][4];
    issue_dq(dq, count - 1 & 1);
    issue_gradient<SecondCols>(dv, p, smem.second_cols[ring.stage()]);
    issue_gradient<FirstCols>(dk, ds, smem.first_cols[ring.stage()]);
    barrier_wait(smem.ds_empty[count & 1], count >> 1 & 1 ^ 1);
    store_ds(ds, count & 1);
    cute::warpgroup_wait<2>();
    fence_registers(dq);
    if (count > 0) store_dq(dq, count - 1);
    cute::warpgroup_wait<0>();
    fence_registers(dv);
    fence_registers(dk);
    fence_registers(p);
    fence_registers(ds);
    Base::release_stage(ring.stage());
    ring.advance();
  }

  // dQ of the last step.
  BROADHEAD_DEVICE void last_dq(std::uint32_t count) const {
    float dq[Traits::kDqTiles][4];
    wait_ds(count);
    issue_dq(dq, count & 1);
    cute::warpgroup_wait<0>();
    fence_registers(dq);
    store_dq(dq, count);
  }

  BROADHEAD_DEVICE void run() {
    if (has_steps(smem.work)) {
      barrier_wait(smem.rows_full[0], 0);
      barrier_wait(smem.rows_full[1], 0);
      barrier_wait(smem.keys_ready, 0);
    }
    float dk[Traits::kHeadDim / 8][4], dv[Traits::kHeadDimV / 8][4];
    clear_accumulators(dk);
    clear_accumulators(dv);
    if (has_steps(smem.work)) {
      typename Base::KeptK k;
      typename Base::KeptV v;
      Base::template keep<typename Traits::FirstRows>(k, smem.first_rows);
      Base::template keep<typename Traits::SecondRows>(v, smem.second_rows);
      const auto uniform = Base::uniform();
      std::uint32_t count = 0;
      Base::for_each_tile([&](int query0) { step(dk, dv, k, v, uniform, query0, count++); });
      last_dq(count - 1);
    }
    Base::write_dk(dk);
    Base::write_dv(dv);
  }
};

}  // namespace broadhead::sm90
