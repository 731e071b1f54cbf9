// What the ranges of neighbouring queries cover together, and which keys anybody sees by them: a small step in front of
// kernels whose call gives query_ranges or a tree_mask. Kernels learn from it which n_blocks a tile visits, and which
// queries a tile of keys meets (AttentionMask::given_interval, given_queries).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/seqlen_info.h"
#include "host/params.h"

struct CUstream_st;

namespace broadhead {

inline bool has_given_masks(const MaskValues& values) {
  return values.query_ranges != nullptr || values.tree_mask != nullptr;
}

// Bytes of the scratch, a multiple of 256; 0 where no mask is given. It is the first part of a call's workspace.
template <class Params>
std::int64_t mask_extent_bytes(const Params& params) {
  if (!has_given_masks(params.mask_values)) return 0;
  const std::int64_t bytes = key_extent_offset(params) + num_key_extents(params) * sizeof(KeyExtent);
  return (bytes + 255) / 256 * 256;
}

// Sets the extents that lie in `workspace`, and launches what fills them. Returns a cudaError_t.
int launch_mask_extents(AttnParams& params, void* workspace, CUstream_st* stream);
int launch_mask_extents(AttnBwdParams& params, void* workspace, CUstream_st* stream);

}  // namespace broadhead
