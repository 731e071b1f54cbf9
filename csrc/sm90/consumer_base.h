// What consumer warpgroups of the kernels for head_dim <= 256 share: ping-pong, barriers, S = Q K^T, the loop over
// tiles.
#pragma once

#include "common/accumulator.h"
#include "sm90/consumer.h"
#include "sm90/wgmma.h"
#include "tma/kernel_args.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits_>
struct ConsumerBase {
  using Traits = Traits_;
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using QLayout = typename Traits::QLayout;
  using KLayout = typename Traits::KLayout;
  static_assert(Traits::kStages == 2, "the position in the ring of V follows from that of K");

  const KernelArgs& args;
  Storage& smem;
  const int warpgroup;
  RingState<2> ring;  // the ring of K; V is used one n_block later
  std::uint32_t q_parity = 0;
  float s[1][Traits::kKeyTiles][4];

  BROADHEAD_DEVICE ConsumerBase(const KernelArgs& args_, Storage& smem_)
      : args(args_),
        smem(smem_),
        // Uniform in a warp, and the compiler should know it.
        warpgroup(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1) {}

  // The warp's first row in the tile.
  BROADHEAD_DEVICE static int warp_row() { return (static_cast<int>(threadIdx.x) / 32 - 4) * 16; }

  BROADHEAD_DEVICE static bool leader() { return threadIdx.x % 32 == 0; }

  // Lets the first warpgroup issue.
  BROADHEAD_DEVICE void ping_pong_start() {
    if (Traits::kPingPong && warpgroup == Traits::kConsumers - 1) {
      NamedBarrier::arrive(256, hardware_id(kPingPongBarrier));
    }
  }
  BROADHEAD_DEVICE void ping_pong_wait() {
    if constexpr (Traits::kPingPong) NamedBarrier::sync(256, hardware_id(kPingPongBarrier + warpgroup));
  }
  BROADHEAD_DEVICE void ping_pong_pass() {
    if constexpr (Traits::kPingPong) {
      NamedBarrier::arrive(256, hardware_id(kPingPongBarrier + (warpgroup + 1) % Traits::kConsumers));
    }
  }

  BROADHEAD_DEVICE void wait_full(Barrier& barrier, std::uint32_t parity) {
    barrier_wait(barrier, parity);
    if (args.maps.gather) cutlass::arch::fence_view_async_shared();  // cp.async writes are ordinary ones
  }

  BROADHEAD_DEVICE void release(Barrier& barrier) {
    if (leader()) barrier.arrive();
  }

  BROADHEAD_DEVICE void issue_qk(std::uint32_t stage) {
    using Descriptor = MatrixDescriptor<QLayout::kRowBytes>;
    const std::uint64_t a =
        Descriptor::make(smem_address(smem.q) + warpgroup * 8 * QLayout::kAtomBytes, 0, QLayout::kAtomBytes);
    const std::uint64_t b = Descriptor::make(smem_address(smem.k[stage]), 0, KLayout::kSlabStride);
    clear_accumulators(s);  // tells the compiler that they hold nothing of use: the first wgmma does not accumulate
    cute::warpgroup_arrive();
    BROADHEAD_UNROLL
    for (int step = 0; step < Traits::kHeadDim * static_cast<int>(sizeof(Element)) / 32; ++step) {
      wgmma_ss<Element, Traits::kTileN, Major::K>(
          s[0], a + (QLayout::step_offset(step, Traits::kTileM * QLayout::kRowBytes) >> 4),
          b + (KLayout::step_offset(step, KLayout::kSubtileStride) >> 4), step > 0);
    }
    cute::warpgroup_commit_batch();
    fence_registers(s[0]);
  }

  // Whether keys of the stage do not exist. Asked once its K is there, ahead of ping_pong_wait.
  BROADHEAD_DEVICE bool some_missing(std::uint32_t stage) const {
    return is_paged<Traits>(args.params) && smem.missing[stage].any();
  }

  // Hides the keys of the stage that do not exist from its finished S, before its K is released.
  BROADHEAD_DEVICE void hide_missing_keys(std::uint32_t stage) {
    const auto& missing = smem.missing[stage];
    hide_missing(s, [&](int n) { return missing_pair(missing.keys[n / 4], n); });
  }
};

// All tiles of a consumer: run_tile, write_tile.
template <class Consumer>
BROADHEAD_DEVICE void consume_tiles(Consumer& consumer) {
  using Traits = typename Consumer::Traits;
  auto& smem = consumer.smem;
  consumer.ping_pong_start();
  SlotState slot;
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const auto& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    consumer.run_tile(tile.state);
    consumer.write_tile(tile.state, split_of<Traits>(tile));
    slot.forget();
    __syncwarp();
    consumer.release(smem.tile_empty[slot.stage()]);
    slot.advance();
  }
}

}  // namespace broadhead::sm90
