// The instructions of the portable kernels: mma.sync through CuTe; cp.async in PTX, as CuTe's makes other machine code,
// and named barriers, as CUTLASS's trap before SM90.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "common/device.h"
#include "common/ldmatrix.h"

namespace broadhead::mma_sync {

template <class Element>
struct MmaAtom;

template <>
struct MmaAtom<cutlass::bfloat16_t> {
  using Op = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};

template <>
struct MmaAtom<cutlass::half_t> {
  using Op = cute::SM80_16x8x16_F32F16F16F32_TN;
};

// d += a (16 x 16, rows) * b (16 x 8, columns)
template <class Element>
BROADHEAD_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MmaAtom<Element>::Op::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
}

// Copies 16 bytes; when `live` is false it writes 16 zero bytes and does not read `source`. With CuTe's, which takes
// references, decode kernels for 8.0 come out in another order.
BROADHEAD_DEVICE void cp_async_16(std::uint32_t target, const void* source, bool live) {
  const int bytes = live ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes)
               : "memory");
}

// The same for one fp32 number: it goes through the L1.
BROADHEAD_DEVICE void cp_async_4(std::uint32_t target, const void* source, bool live) {
  const int bytes = live ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// CuTe's waits for 0 with another instruction, wait_all.
template <int kPending>
BROADHEAD_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A barrier among `threads` threads; id 0 is __syncthreads.
BROADHEAD_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives there for those that wait: what was written before is theirs to read.
BROADHEAD_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace broadhead::mma_sync
