// Where the K and V of a tile lie, and which of its keys are live: seen by some query of it.
#pragma once

#include <cstdint>

#include "common/attention_mask.h"

namespace broadhead {

// The keys that any query of a tile sees. The others are zero-filled, never read: they may be unwritten cache slots,
// freed pages or another sequence.
struct LiveKeys {
  KeyInterval interval;  // by the positions of the queries, besides the prefix
  int prefix_len;
  KeyInterval given = {0, 0};  // those that are live by a range or a tree_mask lie within, and have a bit in `extents`
  const KeyExtent* extents = nullptr;

  BROADHEAD_DEVICE bool contains(int key) const {
    return (key >= interval.begin && key < interval.end) || key < prefix_len ||
           (key >= given.begin && key < given.end && is_given(key));
  }

  // Whether some query of the sequence sees `key` by its range or by the tree_mask.
  BROADHEAD_DEVICE bool is_given(int key) const {
    return extents == nullptr || ((extents[key / kExtentKeys].live >> (key % kExtentKeys)) & 1) != 0;
  }

  // Whether any of keys [key, key + count) may be live.
  BROADHEAD_DEVICE bool any(int key, int count) const {
    return (key < interval.end && key + count > interval.begin) || key < prefix_len ||
           (key < given.end && key + count > given.begin);
  }

  // Whether all of them are known to be live. That holds for every n_block that some row of the tile sees whole by its
  // position.
  BROADHEAD_DEVICE bool all(int key, int count) const {
    const bool joined = interval.begin <= prefix_len;  // the prefix and the interval are one
    return key + count <= prefix_len ||
           (key >= (joined ? 0 : interval.begin) && key + count <= max_int(interval.end, joined ? prefix_len : 0));
  }
};

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
