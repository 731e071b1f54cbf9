// Where a role is in a ring of stages, in few registers.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace broadhead::tma {

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
