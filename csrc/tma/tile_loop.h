// The loop of a producer warp over the tiles that the scheduler warp posts, and its request for the next one.
#pragma once

#include "common/math.h"
#include "tma/work_source.h"

namespace broadhead::tma {

// n_blocks before the end of a tile's loads at which the next tile is taken: late, so that the longest waiting CTA of
// the grid gets it, but early enough to hide the 2 us until it is posted.
constexpr int kBlocksAhead = 4;

// A producer's tiles in order; `body` gets each one's state. `arrives`: of the lanes of a warp, the one that frees a
// tile's slot.
template <class Storage, class Body>
BROADHEAD_DEVICE void for_each_tile(Storage& smem, bool arrives, const Body& body) {
  SlotState slot;
  while (true) {
    barrier_wait(smem.tile_full[slot.stage()], slot.parity());
    const auto& tile = smem.tiles[slot.stage()];
    if (!tile.valid) break;
    body(tile.state);
    __syncwarp();
    if (arrives) smem.tile_empty[slot.stage()].arrive();
    slot.advance();
  }
}

// Tells the scheduler once a tile that its loads are near the end: `block` is the next one, or at the tile's beginning
// range.end.
BROADHEAD_DEVICE void want_next(Barrier& next_wanted, const BlockRange& range, int block) {
  const int at = min_int(range.begin + kBlocksAhead, range.end);
  if (block == at) next_wanted.arrive();
}

}  // namespace broadhead::tma
