// The next work items of a CTA, found before they are computed: the copies of K and V run ahead of the products.
#pragma once

#include "decode/stream_k_search.h"

namespace broadhead::decode {

constexpr int kQueueItems = 2;

// Every warp keeps its own queue of the same items, so that the warps need no barrier to share one.
struct WorkQueue {
  WorkItem items[kQueueItems];
  IntervalCursor cursor;
};

// The items [taken, found) are in the queue and not yet computed.
struct QueueState {
  int found = 0;
  int taken = 0;
};

// Finds items until `wanted` are in the queue or the interval is done, and calls `on_item` with each. All lanes of the
// warp call this.
template <int kTileM, int kTileN, int kKeyGroups, class OnItem>
BROADHEAD_DEVICE void fill_queue(const DecodeParams& params, WorkQueue& queue, QueueState& state, int wanted,
                                 OnItem on_item) {
  IntervalCursor cursor = queue.cursor;
  WorkItem item;
  __syncwarp();
#pragma unroll 1
  while (state.found - state.taken < wanted && next_item<kTileM, kTileN, kKeyGroups>(params, cursor, item)) {
    if (threadIdx.x % 32 == 0) queue.items[state.found % kQueueItems] = item;
    on_item(item);
    ++state.found;
  }
  if (threadIdx.x % 32 == 0) queue.cursor = cursor;
  __syncwarp();
}

}  // namespace broadhead::decode
