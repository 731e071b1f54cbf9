// Instructions since Hopper around its tensor cores: mbarriers, TMA loads, clusters, register reallocation, proxy
// fences.
//
// PTX ISA 8.x, "Asynchronous copies", "mbarrier" and "setmaxnreg". A phase parity is 0 or 1: waiting for parity p
// returns once the barrier's phase p has completed; a fresh barrier's "previous" phase has parity 1.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace broadhead::tma {

using Barrier = std::uint64_t;

BROADHEAD_DEVICE void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the cluster and to TMA.
BROADHEAD_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

BROADHEAD_DEVICE void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&barrier)) : "memory");
}

// One arrival that also announces `bytes` of TMA writes.
BROADHEAD_DEVICE void barrier_expect(Barrier& barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)), "r"(bytes)
               : "memory");
}

// The same shared address in block `rank` of the cluster.
BROADHEAD_DEVICE std::uint32_t map_to_rank(std::uint32_t address, std::uint32_t rank) {
  std::uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// PERF(H200): without .release.cluster, which costs 400 ns an arrival.
BROADHEAD_DEVICE void barrier_arrive_cluster(Barrier& barrier, std::uint32_t rank, int count = 1) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(map_to_rank(smem_address(&barrier), rank)),
               "r"(count)
               : "memory");
}

BROADHEAD_DEVICE void barrier_wait(Barrier& barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(smem_address(&barrier)),
      "r"(parity)
      : "memory");
}

// The arrival of cp.async copies of this thread so far, counted like a plain arrival.
BROADHEAD_DEVICE void barrier_arrive_cp_async(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(&barrier)) : "memory");
}

// Orders this thread's ordinary shared-memory accesses with those of wgmma and TMA.
BROADHEAD_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Loads one box of a five-dimensional tensor; `barrier` counts its bytes.
BROADHEAD_DEVICE void tma_load(const void* map, std::uint32_t target, Barrier& barrier, int c0, int c1, int c2, int c3,
                               int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(target),
      "l"(map), "r"(smem_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The same into the same address of every block in `mask`; the barrier at the same address of each counts it.
BROADHEAD_DEVICE void tma_load_multicast(const void* map, std::uint32_t target, Barrier& barrier, std::uint16_t mask,
                                         int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(target),
      "l"(map), "r"(smem_address(&barrier)), "h"(mask), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Brings such a box into the L2.
BROADHEAD_DEVICE void tma_prefetch(const void* map, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Brings a tensor map itself nearer; its first use then need not wait for it.
BROADHEAD_DEVICE void prefetch_map(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Copies 16 bytes from global to shared memory; zeros, and `source` is not read, unless `live`.
BROADHEAD_DEVICE void cp_async_16(std::uint32_t target, const void* source, bool live) {
  asm volatile(
      "{\n"
      ".reg .pred ignored;\n"
      "setp.eq.s32 ignored, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignored;\n"
      "}\n" ::"r"(target),
      "l"(source), "r"(static_cast<int>(live))
      : "memory");
}

// Writes a word into the shared memory of block `rank`; the barrier there counts its 4 bytes.
BROADHEAD_DEVICE void store_async(std::uint32_t target, std::uint32_t value, Barrier& barrier, std::uint32_t rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(map_to_rank(target, rank)),
      "r"(value), "r"(map_to_rank(smem_address(&barrier), rank))
      : "memory");
}

// threadIdx.x, read where it is needed: what follows from it is not kept in registers over a whole tile.
BROADHEAD_DEVICE int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

BROADHEAD_DEVICE std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Barrier among all threads of the cluster.
BROADHEAD_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

template <int kRegisters>
BROADHEAD_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
BROADHEAD_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Position in a ring of kStages buffers and the parity of its barriers.
template <int kStages>
class RingState {
  std::uint32_t stage_ = 0;
  std::uint32_t parity_ = 0;

 public:
  BROADHEAD_DEVICE std::uint32_t stage() const { return stage_; }
  BROADHEAD_DEVICE std::uint32_t parity() const { return parity_; }
  BROADHEAD_DEVICE void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }
  // Past `count` positions, at most kStages.
  BROADHEAD_DEVICE void skip(int count) {
    stage_ += count;
    if (stage_ >= kStages) {
      stage_ -= kStages;
      parity_ ^= 1;
    }
  }
};

// The same in one register. `back`: that many positions ago.
template <>
class RingState<2> {
  std::uint32_t count_ = 0;

 public:
  BROADHEAD_DEVICE std::uint32_t stage(int back = 0) const { return (count_ - back) & 1; }
  BROADHEAD_DEVICE std::uint32_t parity(int back = 0) const { return (count_ - back) >> 1 & 1; }
  BROADHEAD_DEVICE void advance() { ++count_; }
  BROADHEAD_DEVICE bool advanced() const { return count_ != 0; }  // 2^32 tiles are more than a launch has
  // The compiler forgets what it derived from the position, which would occupy registers over a whole tile.
  BROADHEAD_DEVICE void forget() { asm volatile("" : "+r"(count_)); }
};

}  // namespace broadhead::tma
