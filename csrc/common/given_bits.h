// The inverse of AttentionMask::row_range, by the queries of a warp: which of them see a key by their ranges.
#pragma once

#include "common/attention_mask.h"
#include "common/device.h"

namespace broadhead {

// The queries from `first_query` on that see a key by their ranges, a bit for each of 32: of key first_key + lane / 4.
// All lanes of a warp call it.
BROADHEAD_DEVICE std::uint32_t given_bits(const AttentionMask& mask, int first_query, int first_key) {
  compile_barrier();  // what is known of several words at once takes too many registers
  const int lane = fresh_thread() % 32;
  const int query = first_query + lane;
  KeyInterval range{0, 0};
  if (query < mask.seqlen_q) {
    // A stride of 32 bits, as the library sees to: the product of 64 bits takes registers that some kernels lack.
    const auto* given = static_cast<const std::int32_t*>(mask.given) +
                        static_cast<std::int64_t>(query) * static_cast<int>(mask.given_stride);
    range = mask.clipped_range(query, given[0], given[1]);
  }
  std::uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t of_key = __ballot_sync(0xffffffffu, first_key + i >= range.begin && first_key + i < range.end);
    if (lane / 4 == i) bits = of_key;
  }
  return bits;
}

}  // namespace broadhead
