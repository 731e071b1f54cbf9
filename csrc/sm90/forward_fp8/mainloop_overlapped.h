// A consumer warpgroup of the e4m3 kernel where shared memory has room for a second level of O: 64 query rows.
//
// As in the 16-bit kernel, S of n_block j and O += P V of the n_block before are in flight together, and the softmax of
// j runs beside the latter. Tensor cores cut their sums (Fp8Traits), so O is added to sums in fp32 and begun anew every
// kFlushBlocks n_blocks. Those lie in shared memory, each thread's own: registers have no room for them beside S.
#pragma once

#include "common/accumulator.h"
#include "sm90/consumer_base.h"
#include "sm90/forward_fp8/epilogue.h"
#include "sm90/forward_fp8/traits.h"
#include "sm90/softmax.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
struct OverlappedFp8Consumer final : ConsumerBase<Traits> {
  using Base = ConsumerBase<Traits>;
  using typename Base::Element;
  using OutElement = typename Traits::OutElement;
  using Layout = typename Traits::TransposedLayout;
  using Base::args, Base::ping_pong_pass, Base::q_parity, Base::release, Base::ring, Base::s, Base::smem;
  using Base::wait_full, Base::ping_pong_wait, Base::warp_row;
  using Softmax = BlockSoftmax<true>;
  static constexpr int kOTiles = Traits::kHeadDimV / 8;

  Probabilities<Element, Traits::kKeyTiles> p;  // A operand of P V
  float o[kOTiles][4];    // what the n_blocks since the last flush gave
  float since_flush[2];   // what the sums in shared memory are to be multiplied by
  int unflushed;          // n_blocks in o
  bool flushed;           // there are sums in shared memory
  Softmax softmax;

  using Base::Base;

  BROADHEAD_DEVICE void issue_pv(std::uint32_t stage) {
    const std::uint64_t b =
        MatrixDescriptor<Layout::kRowBytes>::make(smem_address(smem.transposed_v[stage]), 0, Layout::kSlabBytes);
    fence_registers(o);
    fence_registers(p);
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < Layout::kSteps; ++step) {
      wgmma_rs<Element, Traits::kHeadDimV, Major::K>(o, p[step],
                                                     b + (Layout::step_offset(step, Layout::kAtomBytes) >> 4), true);
    }
    cute::warpgroup_commit_batch();
    fence_registers(o);
  }

  // This thread's i-th four sums.
  BROADHEAD_DEVICE float4& sums(int i) const {
    return smem.sums[i * 128 * Traits::kConsumers + fresh_thread() - 128];
  }

  BROADHEAD_DEVICE void flush() {
    BROADHEAD_UNROLL
    for (int i = 0; i < kOTiles; ++i) {
      float4 sum = make_float4(o[i][0], o[i][1], o[i][2], o[i][3]);
      if (flushed) {
        const float4 before = sums(i);
        sum = make_float4(fmaf(before.x, since_flush[0], sum.x), fmaf(before.y, since_flush[0], sum.y),
                          fmaf(before.z, since_flush[1], sum.z), fmaf(before.w, since_flush[1], sum.w));
      }
      sums(i) = sum;
    }
    clear_accumulators(o);
    since_flush[0] = since_flush[1] = 1.f;
    unflushed = 0;
    flushed = true;
  }

  BROADHEAD_DEVICE void add_sums() {
    if (!flushed) return;
    BROADHEAD_UNROLL
    for (int i = 0; i < kOTiles; ++i) {
      const float4 sum = sums(i);
      o[i][0] = fmaf(sum.x, since_flush[0], o[i][0]);
      o[i][1] = fmaf(sum.y, since_flush[0], o[i][1]);
      o[i][2] = fmaf(sum.z, since_flush[1], o[i][2]);
      o[i][3] = fmaf(sum.w, since_flush[1], o[i][3]);
    }
  }

  // S of `block`, whose K is released and of which `some_missing` says what some_missing does, becomes exponentials.
  template <bool kPlain>
  BROADHEAD_DEVICE void exponentiate(const TileState<Element>& state, const BlockKinds& kinds, int block,
                                     bool some_missing, float (&factor)[2]) {
    fence_registers(s[0]);
    if (some_missing) Base::hide_missing_keys(ring.stage());
    release(smem.k_empty[ring.stage()]);
    ring.advance();
    if (!kPlain && !kinds.plain(block)) finish_scores<Traits>(s, state, first_key_of<Traits>(state, block), warp_row());
    softmax.exponentiate_exactly(s, kinds.scale_log2, factor);
    fence_registers(s[0]);
  }

  BROADHEAD_DEVICE void pack_p() {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; n += 2) {
      BROADHEAD_UNROLL
      for (int i = 0; i < 2; ++i) {
        pack_tiles<Element, Traits::kKeyTiles>(
            p, n, i, {s[0][n][2 * i], s[0][n][2 * i + 1], s[0][n + 1][2 * i], s[0][n + 1][2 * i + 1]});
      }
    }
  }

  // S of `block` and O += P V of the n_block before it. kPlain: `block` needs no mask.
  template <bool kPlain>
  BROADHEAD_DEVICE void step(const TileState<Element>& state, const BlockKinds& kinds, int block) {
    wait_full(smem.k_full[ring.stage()], ring.parity());
    const bool some_missing = Base::some_missing(ring.stage());
    if (unflushed == Traits::kFlushBlocks) flush();
    ++unflushed;
    ping_pong_wait();
    Base::issue_qk(ring.stage());
    barrier_wait(smem.transposed_full[ring.stage(1)], ring.parity(1));
    issue_pv(ring.stage(1));
    ping_pong_pass();
    cute::warpgroup_wait<1>();
    float factor[2];
    exponentiate<kPlain>(state, kinds, block, some_missing, factor);
    // As in the 16-bit kernel: ptxas would move the wait ahead of the exponentials.
    if (!is_computed(softmax.row_sum[0] + softmax.row_sum[1])) __trap();
    cute::warpgroup_wait<0>();
    fence_registers(o);
    fence_registers(p);
    release(smem.transposed_empty[ring.stage(2)]);
    scale_rows(o, factor[0], factor[1]);
    since_flush[0] *= factor[0];
    since_flush[1] *= factor[1];
    pack_p();
  }

  BROADHEAD_DEVICE void run_tile(const TileState<Element>& state) {
    softmax = Softmax();
    clear_accumulators(o);
    since_flush[0] = since_flush[1] = 1.f;
    unflushed = 0;
    flushed = false;
    const BlockRange range = state.range;
    if (range.begin >= range.end) return;
    const BlockKinds kinds(state, Traits::kTileN, Traits::kPlainCall);
    barrier_wait(smem.q_full, q_parity);
    q_parity ^= 1;
    wait_full(smem.k_full[ring.stage()], ring.parity());
    const bool some_missing = Base::some_missing(ring.stage());
    ping_pong_wait();
    Base::issue_qk(ring.stage());
    ping_pong_pass();
    cute::warpgroup_wait<0>();
    float factor[2];
    exponentiate<false>(state, kinds, range.end - 1, some_missing, factor);
    pack_p();
    int block = range.end - 2;
    while (block >= range.begin) {
      if (block < kinds.plain_end) {
        for (; block >= max_int(range.begin, kinds.plain_begin); --block) step<true>(state, kinds, block);
        if (block < range.begin) break;
      }
      step<false>(state, kinds, block);
      --block;
    }
    release(smem.q_empty);
    if (unflushed == Traits::kFlushBlocks) flush();
    barrier_wait(smem.transposed_full[ring.stage(1)], ring.parity(1));
    issue_pv(ring.stage(1));
    cute::warpgroup_wait<0>();
    fence_registers(o);
    release(smem.transposed_empty[ring.stage(1)]);
    add_sums();
  }

  BROADHEAD_DEVICE void write_tile(const TileState<Element>& state, int split) {
    float inverse[2];
    RowPlace rows[2];
    finish_fp8_rows<Traits>(args.params, state, softmax, rows, inverse, split);
    scale_rows(o, inverse[0], inverse[1]);
    write_rows<OutElement>(args.params, state.seqlen, rows, o, 0, split);
  }
};

}  // namespace broadhead::sm90
