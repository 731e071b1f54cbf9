// The next items of a block, found ahead of their turn: the loader reads in front of the products.
#pragma once

#include "decode/plan.h"

namespace broadhead::decode {

constexpr int kQueueItems = 2;

// Every warp keeps a queue of its own with the same items, which saves them a barrier.
struct ItemQueue {
  LineItem items[kQueueItems];
  LineCursor cursor;
};

// [taken, found) are known items whose turn is to come.
struct QueueState {
  int found = 0;
  int taken = 0;
};

// Finds items until `wanted` are known or the interval is done; `on_item` sees each. All lanes of the warp.
template <int kTileM, int kKeys, int kKeyGroups, class OnItem>
BROADHEAD_DEVICE void fill_queue(const DecodeParams& params, ItemQueue& queue, QueueState& state, int wanted,
                                 OnItem on_item) {
  LineCursor cursor = queue.cursor;
  LineItem item;
  __syncwarp();
#pragma unroll 1
  while (state.found - state.taken < wanted && next_item<kTileM, kKeys, kKeyGroups>(params, cursor, item)) {
    if (threadIdx.x % 32 == 0) queue.items[state.found % kQueueItems] = item;
    on_item(item);
    ++state.found;
  }
  if (threadIdx.x % 32 == 0) queue.cursor = cursor;
  __syncwarp();
}

}  // namespace broadhead::decode
