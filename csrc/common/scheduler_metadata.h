// Layout of the scheduler metadata and the rule that turns it into a split count.
//
// int32 [1 + 4 R], R = round_up(batch, 4):
//   [0, R)   splits of each sequence        [R, 2R)  metadata_tag of each sequence that was planned, else 0
//   [2R, 4R) zero, reserved                 [4R]     semaphore, zero
// A slot whose tag is not the one the call expects (stale, foreign or zeroed buffer) means one split: no bound depends
// on the contents, so a wrong buffer can not cause a wrong result or an access out of bounds.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/math.h"
#include "host/params.h"

namespace broadhead {

BROADHEAD_HOST_DEVICE int metadata_splits(const std::int32_t* metadata, int batch_size, int batch, int tag,
                                          int num_splits) {
  if (metadata == nullptr || num_splits <= 1) return num_splits;
  const int slots = round_up(batch_size, 4);
  if (metadata[slots + batch] != tag) return 1;
  return max_int(1, min_int(metadata[batch], num_splits));
}

BROADHEAD_HOST_DEVICE int sequence_splits(const AttnParams& params, int batch) {
  return metadata_splits(params.scheduler_metadata, params.batch, batch, params.metadata_tag, params.num_splits);
}

// Estimated time, in key blocks, of a decode step whose longest share is `blocks_per_split`: whole waves of equal
// shares when there are few, the average load plus half a share when there are many. A share costs about 2 blocks to
// start and end.
BROADHEAD_HOST_DEVICE int split_cost(long long shares, long long blocks, int blocks_per_split, int target_ctas) {
  constexpr int kStartupBlocks = 2;
  const int share_cost = blocks_per_split + kStartupBlocks;
  const long long waves = (shares + target_ctas - 1) / target_ctas;
  if (waves <= 4) return static_cast<int>(waves * share_cost);
  return static_cast<int>((blocks + shares * kStartupBlocks) / target_ctas + share_cost / 2);
}

}  // namespace broadhead
