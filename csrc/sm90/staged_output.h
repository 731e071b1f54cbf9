// Writing O through shared memory: whole rows leave a warp side by side, without exchanges between its lanes.
//
// The buffer is the V stage that the next tile fills first: the loader fills it once every warp has its rows back in
// registers (`output_read`), a warp uses it once every warpgroup is past the block that it held. A warp's 16 rows of
// kPassCols columns lie in a part of its own, so that it waits for no other.
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

// A warp's 16 rows of kTiles x 8 columns.
template <class Element, int kPassCols, int kTiles>
class StagedOutput {
  using Rows = StagedRows<Element, kPassCols>;
  static constexpr int kPasses = kTiles * 8 / kPassCols;
  static constexpr int kSteps = Rows::kBytes / 512;  // of a pass: 16 bytes a lane
  static_assert(kPasses * kPassCols == kTiles * 8);
  uint4 words_[kPasses][kSteps];

 public:
  // `o`: of accumulators, lane l has rows l / 4 and l / 4 + 8. `buffer`: the warp's.
  BROADHEAD_DEVICE void exchange(const float (&o)[kTiles][4], std::uint32_t buffer) {
    const int lane = fresh_thread() % 32;
    BROADHEAD_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      if (pass > 0) __syncwarp();
      // stmatrix: lanes 0 to 7 have the addresses of the rows of the first matrix, and so on: two matrices side by
      // side, of the upper and of the lower eight rows.
      BROADHEAD_UNROLL
      for (int t = 0; t < kPassCols / 8; t += 2) {
        const float (&left)[4] = o[pass * (kPassCols / 8) + t];
        const float (&right)[4] = o[pass * (kPassCols / 8) + t + 1];
        store_matrices(buffer + Rows::offset(lane % 16, t + lane / 16), pack_pair<Element>(left[0], left[1]),
                       pack_pair<Element>(left[2], left[3]), pack_pair<Element>(right[0], right[1]),
                       pack_pair<Element>(right[2], right[3]));
      }
      __syncwarp();
      BROADHEAD_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int index = step * 32 + lane;
        uint4& words = words_[pass][step];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                     : "r"(buffer + Rows::offset(index / Rows::kChunks, index % Rows::kChunks))
                     : "memory");
      }
    }
  }

  // `rows`: this lane's of the accumulators.
  BROADHEAD_DEVICE void store(const AttnParams& params, const SeqlenInfo& seqlen, const RowPlace (&rows)[2]) const {
    const int lane = fresh_thread() % 32;
    unsigned long long own[2];  // where the rows begin; 0: not written
    BROADHEAD_UNROLL
    for (int i = 0; i < 2; ++i) {
      own[i] = rows[i].live ? reinterpret_cast<unsigned long long>(output_row<Element>(params, seqlen, rows[i])) : 0;
    }
    BROADHEAD_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int row = (step * 32 + lane) / Rows::kChunks;
      const int chunk = (step * 32 + lane) % Rows::kChunks;
      // From the lane that has the row; a step rarely touches both halves of the rows.
      const int first_half = step * 32 / Rows::kChunks / 8, last_half = (step * 32 + 31) / Rows::kChunks / 8;
      unsigned long long target = __shfl_sync(0xffffffffu, own[first_half], row % 8 * 4);
      if (first_half != last_half) {
        const unsigned long long lower = __shfl_sync(0xffffffffu, own[1], row % 8 * 4);
        if (row >= 8) target = lower;
      }
      BROADHEAD_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const int column = pass * kPassCols + chunk * 8;
        if (target != 0 && column < params.head_dim_v) {
          *reinterpret_cast<uint4*>(target + column * sizeof(Element)) = words_[pass][step];
        }
      }
    }
  }
};

}  // namespace broadhead::sm90
