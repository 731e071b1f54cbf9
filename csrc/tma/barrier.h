// The mbarriers of kernels that load by TMA: CUTLASS's, and two operations in PTX, in forms that CUTLASS lacks.
//
// A phase parity is 0 or 1: waiting for parity p returns once the barrier's phase p has completed; a fresh barrier's
// "previous" phase has parity 1.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>

#include <cstdint>

#include "common/device.h"

namespace broadhead::tma {

// Its functions are volatile and clobber no memory; nvcc (13.0) moves no access of memory over them.
using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Without a time limit: Barrier::wait has one, which adds 64 to 168 instructions to a kernel.
BROADHEAD_DEVICE void barrier_wait(const Barrier& barrier, std::uint32_t parity) {
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

// `count` arrivals at once in CTA `rank` of the cluster: Barrier::arrive(rank) is one.
// PERF(H200): without .release.cluster, which costs 400 ns an arrival.
BROADHEAD_DEVICE void barrier_arrive_cluster(const Barrier& barrier, std::uint32_t rank, int count) {
  asm volatile(
      "mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(cute::set_block_rank(smem_address(&barrier), rank)),
      "r"(count)
      : "memory");
}

}  // namespace broadhead::tma
