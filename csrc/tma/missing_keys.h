// Which keys of a stage of K do not exist, because the page table names a page that the pool does not have.
//
// The producer notes such keys beside the stage, and the consumer sets their scores to -inf. As long as every page
// exists, the producer writes nothing here and the consumer reads one flag a stage.
#pragma once

#include "common/device.h"
#include "common/math.h"

namespace broadhead::tma {

// The notes on the `kKeys` keys of a stage. Each producer warp has a share of the keys, in units of eight. The bits of
// a share are 0 while its flag is 0.
template <int kKeys>
struct MissingKeys {
  static constexpr int kWords = ceil_div(kKeys, 32);
  std::uint32_t flags;         // a byte for each share: not 0 when some of its keys do not exist
  std::uint32_t keys[kWords];  // a bit for each key: set when it does not exist

  // One thread calls it before the kernel's first barrier.
  BROADHEAD_DEVICE void clear() {
    flags = 0;
    BROADHEAD_UNROLL
    for (int i = 0; i < kWords; ++i) keys[i] = 0;
  }

  // Whether some key of the stage does not exist. All lanes of a consumer warp call it.
  BROADHEAD_DEVICE bool any() const { return __any_sync(0xffffffffu, flags != 0); }

  // Whether a producer warp must note its share: a key of it does not exist now (`missing` is set in some lane), or one
  // did not when the stage was last filled. All lanes of the warp call it, before they wait for the stage.
  BROADHEAD_DEVICE bool changes(bool missing, int share) const {
    return __any_sync(0xffffffffu, missing) || reinterpret_cast<const std::uint8_t*>(&flags)[share] != 0;
  }

  // Notes the eight keys of unit `unit`. It is called after the wait for the stage, and only if the share changes.
  BROADHEAD_DEVICE void set_unit(int unit, std::uint32_t bits) {
    reinterpret_cast<std::uint8_t*>(keys)[unit] = static_cast<std::uint8_t>(bits);
  }
  // Sets the flag of the share, after all of its units. `some`: whether a key of the share does not exist.
  BROADHEAD_DEVICE void set_flag(bool some, int share) {
    if (threadIdx.x % 32 == 0) reinterpret_cast<std::uint8_t*>(&flags)[share] = some;
    // Every lane's writes become visible to whichever lane announces the stage, and however it does.
    __threadfence_block();
    __syncwarp();
  }

  // Notes the whole stage from one warp, whose lane u loads keys [u * rows, (u + 1) * rows), all of one page.
  BROADHEAD_DEVICE void note_boxes(bool missing, int rows) {
    static_assert(kKeys <= 32 * 8, "a lane has one unit");
    const unsigned boxes = __ballot_sync(0xffffffffu, missing);
    const unsigned unit = threadIdx.x % 32;
    if (unit < kKeys / 8) set_unit(unit, (boxes >> (unit * 8 / static_cast<unsigned>(rows))) & 1 ? 0xff : 0);
    set_flag(boxes != 0, 0);
  }
};

}  // namespace broadhead::tma
