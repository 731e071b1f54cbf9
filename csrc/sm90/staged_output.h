// Writing O through shared memory: whole rows leave a warp side by side, without exchanges between its lanes.
//
// The buffer is the V stage that the next tile fills first: the loader fills it once every warp has written
// (`output_written`), a warp uses it once every warpgroup is past the block that it held. A warp's 16 rows of
// kPassCols columns lie in its own part, so that it waits for no other.
#pragma once

#include "sm90/consumer.h"

namespace broadhead::sm90 {

template <class Element, int kPassCols>
struct StagedRows {
  static constexpr int kRowBytes = kPassCols * static_cast<int>(sizeof(Element));
  static constexpr int kChunks = kRowBytes / 16;  // of a row
  static constexpr int kBytes = 16 * kRowBytes;   // of a warp
  static_assert(kPassCols % 32 == 0);

  // Where chunk `chunk` of row `row` lies: eight rows of a column of chunks lie in different banks.
  BROADHEAD_DEVICE static std::uint32_t offset(int row, int chunk) {
    const int swizzle = kRowBytes % 128 == 0 ? row % 8 : row / 2 % 4;
    return row * kRowBytes + ((chunk ^ swizzle) * 16);
  }
};

BROADHEAD_DEVICE void store_matrices(std::uint32_t address, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                     std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Columns [col0, col0 + kPassCols) of a warp's 16 rows, of which lane l has `rows` l / 4 and l / 4 + 8. `buffer`: the
// warp's.
template <class Element, int kPassCols, int kTiles>
BROADHEAD_DEVICE void write_staged(const AttnParams& params, Element* const (&targets)[2], const float (&o)[kTiles][4],
                                   int col0, std::uint32_t buffer) {
  using Staged = StagedRows<Element, kPassCols>;
  const int lane = threadIdx.x % 32;
  // stmatrix: lanes 0 to 7 have the addresses of the rows of the first matrix, and so on: two of the upper eight rows
  // and two of the lower ones.
  const int row = lane % 16;
  BROADHEAD_UNROLL
  for (int t = 0; t < kPassCols / 8; t += 2) {
    const float (&left)[4] = o[col0 / 8 + t];
    const float (&right)[4] = o[col0 / 8 + t + 1];
    store_matrices(buffer + Staged::offset(row, t + lane / 16), pack_pair<Element>(left[0], left[1]),
                   pack_pair<Element>(left[2], left[3]), pack_pair<Element>(right[0], right[1]),
                   pack_pair<Element>(right[2], right[3]));
  }
  __syncwarp();
  BROADHEAD_UNROLL
  for (int i = 0; i < Staged::kBytes / 512; ++i) {
    const int index = i * 32 + lane;
    const int chunk = index % Staged::kChunks;
    const int r = index / Staged::kChunks;
    // From the lane that has the row. Of the two halves of the rows a step touches both only where they meet.
    const int first = i * 32 / Staged::kChunks, last = (i * 32 + 31) / Staged::kChunks;
    unsigned long long target;
    if (first / 8 == last / 8) {
      target = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(targets[first / 8]), r % 8 * 4);
    } else {
      const auto upper = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(targets[0]), r % 8 * 4);
      const auto lower = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(targets[1]), r % 8 * 4);
      target = r < 8 ? upper : lower;
    }
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(buffer + Staged::offset(r, chunk))
                 : "memory");
    const int column = col0 + chunk * 8;
    if (target != 0 && column < params.head_dim_v) *reinterpret_cast<uint4*>(target + column * sizeof(Element)) = words;
  }
}

// All columns, in passes. Null targets: rows that are not written.
template <class Element, int kPassCols, int kTiles>
BROADHEAD_DEVICE void write_output_staged(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace (&rows)[2],
                                          const float (&o)[kTiles][4], std::uint32_t buffer) {
  Element* const targets[2] = {rows[0].live ? output_row<Element>(params, seqlen, rows[0]) : nullptr,
                               rows[1].live ? output_row<Element>(params, seqlen, rows[1]) : nullptr};
  static_assert(kTiles * 8 % kPassCols == 0);
  BROADHEAD_UNROLL
  for (int col0 = 0; col0 < kTiles * 8; col0 += kPassCols) {
    if (col0 > 0) __syncwarp();
    write_staged<Element, kPassCols>(params, targets, o, col0, buffer);
  }
}

}  // namespace broadhead::sm90
