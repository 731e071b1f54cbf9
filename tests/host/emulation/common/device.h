// Stands in for csrc/common/device.h where a kernel is run on the CPU (emulator.h): CUDA's types, and the same helpers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"

#define __global__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float log_approx(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }

struct Index {
  int x, y, z;
};
extern Index threadIdx, blockIdx;  // of the thread that runs

namespace cutlass {
struct bfloat16_t {
  std::uint16_t bits;
};
struct half_t {
  std::uint16_t bits;
};
}  // namespace cutlass

namespace broadhead {

// Meets at barrier `id`, of `threads` threads; 0 threads: all of the CTA. Without `wait` it arrives alone.
void meet_at_barrier(int id, int threads, bool wait);

namespace sm80 {
extern char smem_bytes[];  // dynamic shared memory
}

constexpr float kLog2e = 1.4426950408889634f;

inline std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const char*>(pointer) - sm80::smem_bytes);
}
inline void compile_barrier() {}
inline int fresh_thread() { return threadIdx.x; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float select_below(float x, float bound, float below, float other) { return x < bound ? below : other; }
inline float keep_minus_infinity(float x, float other) { return x == -INFINITY ? x : other; }

template <class Element>
std::uint16_t to_16_bits(float x) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    const _Float16 half = static_cast<_Float16>(x);
    std::uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  } else {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

template <class Element>
float from_16_bits(std::uint16_t bits) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  } else {
    const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
}

template <class Element>
std::uint32_t pack_pair(float lo, float hi) {
  return to_16_bits<Element>(lo) | static_cast<std::uint32_t>(to_16_bits<Element>(hi)) << 16;
}

template <class Element>
float2 unpack_pair(std::uint32_t pair) {
  return {from_16_bits<Element>(pair & 0xffff), from_16_bits<Element>(pair >> 16)};
}

}  // namespace broadhead

inline void atomicAdd(float* target, float x) { *target += x; }
void __syncwarp();
std::uint32_t __ballot_sync(std::uint32_t lanes, bool bit);
std::uint32_t __shfl_xor_sync(unsigned mask, std::uint32_t x, int lanes);
inline void __syncthreads() { broadhead::meet_at_barrier(0, 0, true); }
