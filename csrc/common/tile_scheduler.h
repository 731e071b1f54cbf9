// The tile scheduler of dense grids: maps the index of a CTA to its (m_block, head, sequence).
//
// Heads come in sections whose K and V fit the L2 together. Within a section the longest tiles come first (under a
// causal mask the last m_blocks), so that the tail of the grid is made of short work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/divisor.h"
#include "common/macros.h"
#include "common/math.h"

namespace broadhead {

struct WorkTile {
  int m_block;
  int head;  // KV head when GQA is packed, else query head
  int batch;
};

// `Number`: int, or Divisor where the host has made it. `section_heads`: heads of a section, at most `total_heads`,
// which are `heads` of each sequence.
template <class Number>
BROADHEAD_HOST_DEVICE WorkTile work_tile_of(int index, int m_blocks, int total_heads, const Number& heads,
                                            const Number& section_heads) {
  // PERF: a kernel begins with this, and a division takes 0.1 us.
  const int section = section_heads == total_heads ? 0 : index / (m_blocks * section_heads);
  const int first = section * section_heads;
  const int rest = index - section * m_blocks * section_heads;
  const int heads_here = min_int(section_heads, total_heads - first);  // the last section may have fewer
  const int m = heads_here == section_heads ? quotient(rest, section_heads) : rest / heads_here;
  const int linear_head = first + rest - m * heads_here;
  const int sequence = heads == total_heads ? 0 : quotient(linear_head, heads);
  return {m_blocks - 1 - m, linear_head - sequence * heads, sequence};
}

BROADHEAD_HOST_DEVICE int heads_of_section(int heads_per_section, int total_heads) {
  return heads_per_section > 0 ? min_int(heads_per_section, total_heads) : total_heads;
}

BROADHEAD_HOST_DEVICE WorkTile work_tile(int index, int m_blocks, int heads, int batch, int heads_per_section) {
  const int total_heads = heads * batch;
  return work_tile_of(index, m_blocks, total_heads, heads, heads_of_section(heads_per_section, total_heads));
}

// What a launcher works out of a grid, so that its kernel does not divide.
struct TileGrid {
  std::int32_t m_blocks;  // of the longest sequence
  std::int32_t total_heads;
  Divisor heads;  // of a sequence
  Divisor section_heads;

  TileGrid() = default;
  TileGrid(int m_blocks_, int heads_, int batch, int heads_per_section)
      : m_blocks(m_blocks_),
        total_heads(heads_ * batch),
        heads(heads_),
        section_heads(heads_of_section(heads_per_section, heads_ * batch)) {}

  BROADHEAD_HOST_DEVICE WorkTile tile(int index) const {
    return work_tile_of(index, m_blocks, total_heads, heads, section_heads);
  }
};

// The tile that CTA `cta` of `ctas` takes in a round. The longest tiles come first in the grid's order: who got a long
// one in a round gets a short one in the next.
BROADHEAD_HOST_DEVICE int tile_of_round(int round, int cta, int ctas) {
  return round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta);
}

// How many of `heads` KV heads are worked on at a time: `in_l2`, whose columns share the L2, but at least as many as
// fill the device, in sections of one size. Tiles differ in length: a section that begins behind all others with its
// longest tile, and leaves part of the device idle, would make the kernel as long as that tile.
inline std::int64_t section_kv_heads(std::int64_t in_l2, std::int64_t fill, std::int64_t heads) {
  std::int64_t section = std::clamp(in_l2, std::clamp(fill, std::int64_t{1}, heads), heads);
  const std::int64_t wanted = section;
  while (heads % section != 0 && section > fill) --section;
  if (heads % section == 0) return section;
  for (section = wanted; heads % section != 0;) ++section;
  return section;
}

}  // namespace broadhead
