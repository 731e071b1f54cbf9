// Copies in PTX that CUTLASS lacks: TMA without a cache hint, cp.async of zeros by a predicate, a bulk addition, stores
// of 16 bytes into another CTA; and a prefetch.
#pragma once

#include "tma/barrier.h"

namespace broadhead::tma {

// Loads one box of a five-dimensional tensor; `barrier` counts its bytes. CuTe's always takes a cache hint, 64 bits in
// registers more.
BROADHEAD_DEVICE void tma_load(const void* map, std::uint32_t target, Barrier& barrier, int c0, int c1, int c2, int c3,
                               int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(target),
      "l"(map), "r"(smem_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The same into the same address of every CTA in `mask`; the barrier at the same address of each counts it.
BROADHEAD_DEVICE void tma_load_multicast(const void* map, std::uint32_t target, Barrier& barrier, std::uint16_t mask,
                                         int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(target),
      "l"(map), "r"(smem_address(&barrier)), "h"(mask), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Brings such a box into the L2. With CuTe's, the same instruction, the compiler orders the wide kernel's producer
// otherwise.
BROADHEAD_DEVICE void tma_prefetch(const void* map, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Copies 16 bytes from global to shared memory; zeros, and `source` is not read, unless `live`. CuTe's selects a size,
// in a register for each copy.
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

// Adds `bytes` of fp32 in shared memory to those in global memory, as part of the thread's bulk group. CuTe's additions
// need a tensor map.
BROADHEAD_DEVICE void bulk_add(float* target, std::uint32_t source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target), "r"(source),
               "r"(bytes)
               : "memory");
}

// Stores 16 bytes in the shared memory of a CTA of the cluster; `barrier`, there too, counts them. Both are addresses
// in the cluster's window. CuTe's stores 4 bytes.
BROADHEAD_DEVICE void store_async_cluster(std::uint32_t target, const uint4& x, std::uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
      : "memory");
}

}  // namespace broadhead::tma
