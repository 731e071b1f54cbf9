// Writes the rows of O that a consumer warpgroup has finished: the output, or a split's partial output.
//
// The lane layout is that of consumer.h.
#pragma once

#include "common/quad.h"
#include "common/row_result.h"

namespace broadhead::sm90 {

// Writes 8 * kTiles columns from `col0` on of this lane's two finished rows. Lanes of a quad first exchange words, so
// that each stores 16 bytes of a row; shared memory stays free for the next tile.
template <class Element, int kTiles>
BROADHEAD_DEVICE void write_output(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace (&rows)[2],
                                   const float (&o)[kTiles][4], int col0) {
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  static_assert(kTiles % 4 == 0);
  BROADHEAD_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool live = rows[i].live;
    Element* target = output_row<Element>(params, seqlen, rows[i]) + col0 + quad * 8;
    BROADHEAD_UNROLL
    for (int t = 0; t < kTiles; t += 4) {
      std::uint32_t w[4];
      BROADHEAD_UNROLL
      for (int u = 0; u < 4; ++u) w[u] = pack_pair<Element>(o[t + u][2 * i], o[t + u][2 * i + 1]);
      const uint4 value = transpose_quad(w, quad);
      if (live && col0 + t * 8 + quad * 8 < params.head_dim_v) {
        *reinterpret_cast<uint4*>(target + t * 8) = value;
      }
    }
  }
}

// Writes O into the partial output of a split.
template <int kTiles>
BROADHEAD_DEVICE void write_partial(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace (&rows)[2],
                                    const float (&o)[kTiles][4], int col0, int split) {
  const int lane = threadIdx.x % 32;
  BROADHEAD_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (!rows[i].live) continue;
    float* target = partial_row(params, seqlen, rows[i], split);
    BROADHEAD_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int column = col0 + t * 8 + lane % 4 * 2;
      if (column < params.head_dim_v) {
        *reinterpret_cast<float2*>(target + column) = make_float2(o[t][2 * i], o[t][2 * i + 1]);
      }
    }
  }
}

// `split` < 0: the final output.
template <class Element, int kTiles>
BROADHEAD_DEVICE void write_rows(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace (&rows)[2],
                                 const float (&o)[kTiles][4], int col0, int split) {
  if (split < 0) {
    write_output<Element>(params, seqlen, rows, o, col0);
  } else {
    write_partial(params, seqlen, rows, o, col0, split);
  }
}

// Where this lane's two rows go: `row` of the tile and the one eight below.
BROADHEAD_DEVICE void place_rows(RowPlace (&rows)[2], const OutputRows& output, int row) {
  rows[0] = place_row(output, row);
  rows[1] = place_row(output, row + 8);
}

// Drops the rows of a split without visible keys: their LSE alone tells the combine.
BROADHEAD_DEVICE void drop_empty(RowPlace (&rows)[2], bool first_empty, bool second_empty, int split) {
  if (split < 0) return;
  rows[0].live = rows[0].live && !first_empty;
  rows[1].live = rows[1].live && !second_empty;
}

}  // namespace broadhead::sm90
