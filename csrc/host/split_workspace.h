// The workspace of a forward call that leaves partial results for the combine: how large it is, and what lies where.
#pragma once

#include <cstdint>

#include "host/params.h"

namespace broadhead {

// Rows of partial results: [num_splits, Hq, R]; 0 where nothing is split.
inline std::int64_t partial_rows(const AttnParams& params) {
  if (params.num_splits <= 1) return 0;
  return static_cast<std::int64_t>(params.num_splits) * params.num_heads_q * params.total_q;
}

// Bytes of out_partial, lse_partial behind it, and, for kernels that count their tiles, tile_counter behind both.
inline std::int64_t split_workspace_bytes(const AttnParams& params, bool counts_tiles) {
  return 4 * (partial_rows(params) * (params.head_dim_v + 1) + (counts_tiles ? 1 : 0));
}

// Sets these addresses in a call whose out_partial is its workspace. Returns false when that is too small.
inline bool place_split_workspace(AttnParams& params, bool counts_tiles) {
  const std::int64_t bytes = split_workspace_bytes(params, counts_tiles);
  if (bytes == 0) return true;
  if (params.out_partial == nullptr || params.workspace_bytes < bytes) return false;
  const std::int64_t rows = partial_rows(params);
  float* const lse = params.out_partial + rows * params.head_dim_v;
  if (rows > 0) params.lse_partial = lse;
  if (counts_tiles) params.tile_counter = reinterpret_cast<std::int32_t*>(lse + rows);
  return true;
}

}  // namespace broadhead
