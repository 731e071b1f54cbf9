// A gradient warpgroup of the wide Hopper backward kernels: 64 rows and half of the columns of dK, dV or dQ.
#pragma once

#include "common/gradient_rows.h"
#include "sm90/backward/mainloop.h"
#include "sm90/backward_wide/load.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct PairGradient {
  using Element = typename Traits::Element;
  using Chunk = typename Traits::Chunk;

  const AttnBwdParams& params;
  typename Traits::SharedStorage& smem;
  const std::uint32_t rank;
  const int half;  // 0: left columns
  RingState<Traits::kStages> ring;
  RingState<2> slot;
  float gradient[Traits::kParts][Traits::kPartCols / 8][4];

  BROADHEAD_DEVICE static bool leader() { return fresh_thread() % 128 == 0; }

  BROADHEAD_DEVICE void fence_gradient() {
    BROADHEAD_UNROLL
    for (int part = 0; part < Traits::kParts; ++part) fence_registers(gradient[part]);
  }

  // wgmma is an instruction of the whole warpgroup: one thread's wait tells of all.
  BROADHEAD_DEVICE void release_part(int part) {
    if (leader()) smem.chunk_empty[ring.stage()][Traits::chunk_of(half, part)].arrive();
  }

  // gradient += weights x columns of a step.
  BROADHEAD_DEVICE void add_step() {
    using Descriptor = MatrixDescriptor<128>;
    barrier_wait(smem.prepared[ring.stage()], ring.parity());
    Barrier& received = smem.received[slot.stage()];
    barrier_wait(received, slot.parity());
    cutlass::arch::fence_view_async_shared();  // written by ordinary stores of the other CTA, read by wgmma
    if (rank == 0 && half == 0 && leader()) received.arrive_and_expect_tx(Traits::received_bytes(0));  // the next ones
    const std::uint64_t a =
        Descriptor::make(smem_address(smem.weights[slot.stage()]), 0, Traits::WeightLayout::kSlabStride);
    fence_gradient();
    BROADHEAD_UNROLL
    for (int part = 0; part < Traits::kParts; ++part) {
      const int chunk = Traits::chunk_of(half, part);
      barrier_wait(smem.chunk_full[ring.stage()][chunk], ring.parity());
      const std::uint64_t b =
          Descriptor::make(smem_address(smem.chunks[ring.stage()][chunk]), Chunk::kSubtileStride, Chunk::kSlabStride);
      cute::warpgroup_arrive();
      BROADHEAD_UNROLL
      for (int step = 0; step < Traits::kWeightSteps; ++step) {
        wgmma_ss<Element, Traits::kPartCols, Major::MN>(gradient[part], a + (step * 32 >> 4),
                                                        b + (step * 2 * Chunk::kSlabStride >> 4), true);
      }
      cute::warpgroup_commit_batch();
      if (part > 0) {
        cute::warpgroup_wait<1>();
        release_part(part - 1);
      }
    }
    cute::warpgroup_wait<0>();
    fence_gradient();
    release_part(Traits::kParts - 1);
    if (leader()) barrier_arrive_cluster(smem.sent_read[slot.stage()], rank ^ 1, 1);
    ring.advance();
    slot.advance();
  }

  BROADHEAD_DEVICE void write(void* tensor, const TensorStrides& strides, int columns, float factor) const {
    const BackwardWork& work = smem.work;
    const SeqlenInfo& seqlen = work.seqlen;
    const int row = work.first_row + lane_row();
    bool keep[2] = {true, true};
    if constexpr (!Traits::kKeys) {
      BROADHEAD_UNROLL
      for (int i = 0; i < 2; ++i) keep[i] = load_query_stats(params, seqlen, work.head, row + 8 * i).lse != INFINITY;
    }
    BROADHEAD_UNROLL
    for (int part = 0; part < Traits::kParts; ++part) {
      const int first = half * Traits::kHalfCols + part * Traits::kPartCols;
      write_gradient(
          gradient[part], factor,
          gradient_rows<Element>(static_cast<Element*>(tensor) + first, strides,
                                 Traits::kKeys ? seqlen.batch_k : seqlen.batch_q,
                                 Traits::kKeys ? seqlen.row_k : seqlen.row_q, work.head, work.end_row, columns - first),
          row, keep);
    }
  }

  BROADHEAD_DEVICE void run() {
    clear_accumulators(gradient);
    for_each_step(smem.work, [&](int, int) { add_step(); });
    if (!Traits::kKeys) {
      write(params.dq, params.dq_strides, params.head_dim, params.softmax_scale);
    } else if (rank == 0) {
      write(params.dk, params.dk_strides, params.head_dim, params.softmax_scale);
    } else {
      write(params.dv, params.dv_strides, params.head_dim_v, 1.f);
    }
  }
};

}  // namespace broadhead::sm90
