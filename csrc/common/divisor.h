// Division by a number that the host knows: a multiplication and a shift in place of some 25 instructions.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace broadhead {

// Divides numbers from 0 to 2^31 - 1. It converts from and to the number that it divides by, which is at least 1.
//
// With 2^(s - 1) < value <= 2^s and multiplier = floor(2^(31 + s) / value) + 1, the quotient is floor(n * multiplier /
// 2^(31 + s)) (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
  std::int32_t value;
  std::uint32_t multiplier;  // 0 where value is 1

  Divisor() = default;
  BROADHEAD_HOST_DEVICE Divisor(std::int32_t value_) : value(value_), multiplier(0) {
    if (value <= 1) return;
    const std::uint64_t power = std::uint64_t{1} << (32 + shift());
    multiplier = static_cast<std::uint32_t>(power / static_cast<std::uint32_t>(value) + 1);
  }

  BROADHEAD_HOST_DEVICE operator std::int32_t() const { return value; }

  BROADHEAD_HOST_DEVICE int quotient(int n) const {
#if defined(__CUDA_ARCH__)
    const std::uint32_t high = __umulhi(static_cast<std::uint32_t>(n), multiplier);
#else
    const std::uint32_t high =
        static_cast<std::uint32_t>((static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * multiplier) >> 32);
#endif
    return static_cast<int>(high >> shift()) + (value == 1 ? n : 0);  // PERF: with a select D192 of e4m3 is serialized
  }

 private:
  // s - 1. It is worked out again where it is needed, since decode tiles have no byte of shared memory to spare.
  BROADHEAD_HOST_DEVICE int shift() const {
#if defined(__CUDA_ARCH__)
    return 31 - __clz((value - 1) | 1);
#else
    int bits = 0;
    while (((value - 1) >> bits) > 1) ++bits;
    return bits;
#endif
  }
};

// n / divisor, n >= 0.
BROADHEAD_HOST_DEVICE int quotient(int n, int divisor) { return n / divisor; }
BROADHEAD_HOST_DEVICE int quotient(int n, const Divisor& divisor) { return divisor.quotient(n); }

}  // namespace broadhead
