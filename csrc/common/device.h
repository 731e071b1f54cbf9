// Small device helpers of every kernel family. The PTX has no function in CUTLASS.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include <cutlass/numeric_types.h>

#include "common/macros.h"

namespace broadhead {

constexpr float kLog2e = 1.4426950408889634f;

BROADHEAD_DEVICE std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Keeps the compiler from computing what follows early, which would occupy registers.
BROADHEAD_DEVICE void compile_barrier() { asm volatile("" ::: "memory"); }

// threadIdx.x, read where it is needed: what follows from it is not kept in registers over a whole tile.
BROADHEAD_DEVICE int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

BROADHEAD_DEVICE float log_approx(float x) { return __logf(x); }

// CUTLASS has the exponential to base e alone.
BROADHEAD_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x < bound ? below : other, both of which are computed: the compiler would rather branch around what is dear, number
// by number.
BROADHEAD_DEVICE float select_below(float x, float bound, float below, float other) {
  float selected;
  asm("{\n"
      ".reg .pred p;\n"
      "setp.lt.f32 p, %1, %2;\n"
      "selp.f32 %0, %3, %4, p;\n"
      "}"
      : "=f"(selected)
      : "f"(x), "f"(bound), "f"(below), "f"(other));
  return selected;
}

// x == -inf ? x : other, likewise.
BROADHEAD_DEVICE float keep_minus_infinity(float x, float other) {
  float selected;
  asm("{\n"
      ".reg .pred p;\n"
      "setp.eq.f32 p, %1, 0fFF800000;\n"
      "selp.f32 %0, %1, %2, p;\n"
      "}"
      : "=f"(selected)
      : "f"(x), "f"(other));
  return selected;
}

// Two numbers rounded to nearest even, `lo` in the low half. With CUTLASS's conversion the compiler orders the e4m3
// kernel otherwise.
template <class Element>
BROADHEAD_DEVICE std::uint32_t pack_pair(float lo, float hi) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}

// Its inverse: {low half, high half}.
template <class Element>
BROADHEAD_DEVICE float2 unpack_pair(std::uint32_t pair) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

}  // namespace broadhead
