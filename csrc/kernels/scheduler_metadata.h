// Choosing the split counts of get_scheduler_metadata: what a count costs, and the launcher.
#pragma once

#include <cstddef>

#include "common/macros.h"
#include "host/params.h"

struct CUstream_st;

namespace broadhead {

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

// Fills the metadata of one call, laid out as in common/scheduler_metadata.h.
int launch_scheduler_metadata(const SchedulerMetadataParams& params, CUstream_st* stream, char* error,
                              std::size_t error_size);

}  // namespace broadhead
