// The split counts of get_scheduler_metadata: what a count costs, and the launcher.
#pragma once

#include <cstddef>

#include "common/macros.h"
#include "host/params.h"

struct CUstream_st;

namespace broadhead {

// The estimated time, in n_blocks, of a decode step whose longest split has `n_blocks_per_split`: whole waves of equal
// splits when there are few, the average load plus half a split when there are many. A split costs about 2 n_blocks to
// start and end.
BROADHEAD_HOST_DEVICE int split_cost(long long splits, long long n_blocks, int n_blocks_per_split, int target_ctas) {
  constexpr int kStartupNBlocks = 2;
  const int one_split = n_blocks_per_split + kStartupNBlocks;
  const long long waves = (splits + target_ctas - 1) / target_ctas;
  if (waves <= 4) return static_cast<int>(waves * one_split);
  return static_cast<int>((n_blocks + splits * kStartupNBlocks) / target_ctas + one_split / 2);
}

// Fills the metadata of one call, laid out as in common/scheduler_metadata.h.
int launch_scheduler_metadata(const SchedulerMetadataParams& params, CUstream_st* stream, char* error,
                              std::size_t error_size);

}  // namespace broadhead
