// Words of 32 bits, one for each of neighbouring keys or queries: which of them are seen. Its PTX is a shift by 32 and
// more, which gives 0 there and is not defined in C++; CUTLASS has no such function.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/math.h"

namespace broadhead {

// The bits below `n`: none where n <= 0, all where n >= 32.
BROADHEAD_HOST_DEVICE std::uint32_t bits_below(int n) {
#if defined(__CUDA_ARCH__)
  // The shift of PTX gives 0 from 32 on, where that of C++ is not defined.
  std::uint32_t above;
  asm("shl.b32 %0, %1, %2;" : "=r"(above) : "r"(0xffffffffu), "r"(max_int(n, 0)));
  return ~above;
#else
  return n <= 0 ? 0u : n >= 32 ? ~0u : (1u << n) - 1;
#endif
}

// The bits of [begin, end).
BROADHEAD_HOST_DEVICE std::uint32_t bits_between(int begin, int end) { return bits_below(end) & ~bits_below(begin); }

// Bits [first, first + 32) of a word of 64 bits; 0 outside of it.
BROADHEAD_HOST_DEVICE std::uint32_t bits_from(std::uint64_t word, int first) {
  if (first <= -32 || first >= 64) return 0;
  return static_cast<std::uint32_t>(first >= 0 ? word >> first : word << -first);
}

}  // namespace broadhead
