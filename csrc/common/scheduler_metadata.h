// Layout of the scheduler metadata and the rule that turns it into a split count.
//
// int32 [1 + 4 R], R = round_up(batch, 4):
//   [0, R)   splits of each sequence        [R, 2R)  metadata_tag of each sequence that was planned, else 0
//   [2R, 4R) zero, reserved                 [4R]     semaphore, zero
// A slot whose tag is not the one the call expects (stale, foreign or zeroed buffer) means one split: no bound depends
// on the contents, so a wrong buffer cannot cause a wrong result or an access out of bounds.
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

}  // namespace broadhead
