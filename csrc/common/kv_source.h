// Where the K and V of a tile lie, and which of its keys are live: seen by some query of it.
#pragma once

#include <cstdint>

#include "common/attention_mask.h"
#include "common/device.h"

namespace broadhead {

// The keys that any query of a tile sees by its position. The others are zero-filled, never read: they may be unwritten
// cache slots, freed pages or another sequence.
struct PlacedKeys {
  KeyInterval interval;  // besides the prefix
  int prefix_len;

  BROADHEAD_DEVICE bool in_interval(int key) const { return key >= interval.begin && key < interval.end; }

  BROADHEAD_DEVICE bool contains(int key) const { return in_interval(key) || key < prefix_len; }

  // Whether any of keys [key, key + count) is live.
  BROADHEAD_DEVICE bool any(int key, int count) const {
    return (key < interval.end && key + count > interval.begin) || key < prefix_len;
  }

  // Whether all of them are live. That holds for every n_block that some row of the tile sees whole by its position.
  BROADHEAD_DEVICE bool all(int key, int count) const {
    const bool joined = interval.begin <= prefix_len;  // the prefix and the interval are one
    return key + count <= prefix_len ||
           (key >= (joined ? 0 : interval.begin) && key + count <= max_int(interval.end, joined ? prefix_len : 0));
  }
};

// Likewise with those that are seen by a range or by a tree_mask: they lie within `given`, and have a bit in `extents`,
// or have none to have (queries that meet keys).
struct LiveKeys : PlacedKeys {
  KeyInterval given = {0, 0};
  const KeyExtent* extents = nullptr;

  BROADHEAD_DEVICE LiveKeys() = default;
  BROADHEAD_DEVICE LiveKeys(const KeyInterval& interval_, int prefix_len_, const KeyInterval& given_ = {0, 0},
                            const KeyExtent* extents_ = nullptr)
      : PlacedKeys{interval_, prefix_len_}, given(given_), extents(extents_) {}

  BROADHEAD_DEVICE bool contains(int key) const {
    return PlacedKeys::contains(key) || (key >= given.begin && key < given.end &&
                                         (extents == nullptr || MaskExtents{nullptr, extents}.contains(key)));
  }
  BROADHEAD_DEVICE bool any(int key, int count) const {
    return PlacedKeys::any(key, count) || (key < given.end && key + count > given.begin);
  }
};

// Which of the 32 keys from key0 on are live: a bit for each. All lanes of a warp call it.
BROADHEAD_DEVICE std::uint32_t live_word(const LiveKeys& live, int key0) {
  const std::uint32_t placed =
      bits_between(live.interval.begin - key0, live.interval.end - key0) | bits_below(live.prefix_len - key0);
  if (__builtin_expect(live.given.begin >= live.given.end, 1)) return placed;
  return placed | __ballot_sync(0xffffffffu, live.contains(key0 + fresh_thread() % 32));
}

// The K/V of one sequence and head. It lives in shared memory: registers are what these kernels are short of.
template <class Element>
struct KvSource {
  const Element* k;  // first key (dense, packed) or first page (paged) of the head
  const Element* v;
  long long k_row_stride;
  long long v_row_stride;
  const std::int32_t* table;  // page-table row of the sequence; null: not paged
  int leftpad;                // paged: logical row of key 0
  LiveKeys live;
  int head_dim;
  int head_dim_v;
};

}  // namespace broadhead
