// Keys of a stage of K that do not exist: the page table names a page that the pool does not have.
//
// Loaders note them beside the stage, and consumers let S of such keys begin at -inf. As long as all pages exist
// nothing is written, and a flag is all that is read.
#pragma once

#include "common/device.h"
#include "common/math.h"

namespace broadhead::tma {

// Notes about the `kKeys` keys of a stage. Loading warps have shares of them, each in units of eight keys; what a
// share's flag does not announce is 0.
template <int kKeys>
struct MissingKeys {
  static constexpr int kWords = ceil_div(kKeys, 32);
  std::uint32_t flags;  // a byte a share
  std::uint32_t keys[kWords];  // a bit a key

  // Before the kernel's first barrier, by one thread.
  BROADHEAD_DEVICE void clear() {
    flags = 0;
    BROADHEAD_UNROLL
    for (int i = 0; i < kWords; ++i) keys[i] = 0;
  }

  // For the consumer, by all lanes of a warp.
  BROADHEAD_DEVICE bool any() const { return __any_sync(0xffffffffu, flags != 0); }

  // For the loader, by all lanes of a warp and before the wait for the stage: whether the share must be noted. It has
  // missing keys (`missing` in some lane), or had some when the stage was last filled.
  BROADHEAD_DEVICE bool changes(bool missing, int share) const {
    return __any_sync(0xffffffffu, missing) || reinterpret_cast<const std::uint8_t*>(&flags)[share] != 0;
  }

  // Behind the wait, if it changes. Bits of unit `unit`:
  BROADHEAD_DEVICE void set_unit(int unit, std::uint32_t bits) {
    reinterpret_cast<std::uint8_t*>(keys)[unit] = static_cast<std::uint8_t>(bits);
  }
  // Last. `some`: whether the share has missing keys.
  BROADHEAD_DEVICE void set_flag(bool some, int share) {
    if (threadIdx.x % 32 == 0) reinterpret_cast<std::uint8_t*>(&flags)[share] = some;
    // Every lane's writes become visible to whichever lane announces the stage, and however it does.
    __threadfence_block();
    __syncwarp();
  }

  // A warp whose lane u loads keys [u * rows, (u + 1) * rows), all of one page.
  BROADHEAD_DEVICE void note_boxes(bool missing, int rows) {
    static_assert(kKeys <= 32 * 8, "a lane has one unit");
    const unsigned boxes = __ballot_sync(0xffffffffu, missing);
    const unsigned unit = threadIdx.x % 32;
    if (unit < kKeys / 8) set_unit(unit, (boxes >> (unit * 8 / static_cast<unsigned>(rows))) & 1 ? 0xff : 0);
    set_flag(boxes != 0, 0);
  }
};

}  // namespace broadhead::tma
