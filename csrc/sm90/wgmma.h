// wgmma through CuTe's instruction wrappers, on shared-memory descriptors and plain register arrays.
//
// Shared tiles are sequences of 8-row units (kAtomBytes): 8 rows of kRowBytes whose 16-byte parts are swizzled, as TMA
// writes them. PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout".
#pragma once

#ifndef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // every N that is a multiple of 8
#endif
#include <cute/arch/mma_sm90.hpp>
#include <cute/int_tuple.hpp>

#include <utility>

#include "common/device.h"

namespace broadhead::sm90 {

// Rows of 128 bytes (SWIZZLE_128B) or 64 bytes (SWIZZLE_64B).
template <int kRowBytes>
struct MatrixDescriptor {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  static constexpr std::uint64_t kLayout = kRowBytes == 128 ? 1 : 2;

  // `leading`: bytes between repeats along the contiguous dimension (used when the reduction dimension is strided);
  // `stride`: bytes between 8-row units.
  BROADHEAD_DEVICE static std::uint64_t make(std::uint32_t address, std::uint32_t leading, std::uint32_t stride) {
    return (static_cast<std::uint64_t>((address & 0x3ffff) >> 4)) | (static_cast<std::uint64_t>(leading >> 4) << 16) |
           (static_cast<std::uint64_t>(stride >> 4) << 32) | (kLayout << 62);
  }
};

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// The instruction for 64 x kN += 64 x kK * kK x kN (kK: 32 bytes of Element), B with the reduction dimension
// contiguous (K) or strided (MN).
template <class Element, int kN, Major kMajorB>
struct WgmmaOps {
  using Shape = cute::Shape<cute::Int<64>, cute::Int<kN>, cute::Int<32 / static_cast<int>(sizeof(Element))>>;
  using SS = decltype(cute::SM90::GMMA::ss_op_selector<Element, Element, float, Shape, Major::K, kMajorB>());
  using RS = decltype(cute::SM90::GMMA::rs_op_selector<Element, Element, float, Shape, Major::K, kMajorB>());
};

template <class Op, int... kIndex>
BROADHEAD_DEVICE void wgmma_ss_call(std::uint64_t a, std::uint64_t b, float* d, bool accumulate,
                                    std::integer_sequence<int, kIndex...>) {
  Op::fma(a, b, d[kIndex]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
}

template <class Op, int... kIndex>
BROADHEAD_DEVICE void wgmma_rs_call(const std::uint32_t (&a)[4], std::uint64_t b, float* d, bool accumulate,
                                    std::integer_sequence<int, kIndex...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
}

// d += a * b, both operands in shared memory.
template <class Element, int kN, Major kMajorB>
BROADHEAD_DEVICE void wgmma_ss(float (&d)[kN / 8][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
  using Op = typename WgmmaOps<Element, kN, kMajorB>::SS;
  wgmma_ss_call<Op>(a, b, &d[0][0], accumulate, std::make_integer_sequence<int, kN / 2>());
}

// d += a * b, A in registers: the accumulators of 16 columns of a 64 x 16k product, packed, are such an A.
template <class Element, int kN, Major kMajorB>
BROADHEAD_DEVICE void wgmma_rs(float (&d)[kN / 8][4], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  using Op = typename WgmmaOps<Element, kN, kMajorB>::RS;
  wgmma_rs_call<Op>(a, b, &d[0][0], accumulate, std::make_integer_sequence<int, kN / 2>());
}

// Keeps the compiler from moving accesses of registers across this point: wgmma writes them behind its back. Four at a
// time: with CuTe's fence, which takes one, the compiler orders the e4m3 kernel otherwise.
template <int kTiles>
BROADHEAD_DEVICE void fence_registers(float (&d)[kTiles][4]) {
  BROADHEAD_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}
template <int kTiles>
BROADHEAD_DEVICE void fence_registers(std::uint32_t (&d)[kTiles][4]) {
  BROADHEAD_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
  }
}

}  // namespace broadhead::sm90
