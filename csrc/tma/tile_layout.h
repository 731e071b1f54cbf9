// How a matrix lies in shared memory for TMA to fill and the tensor cores to read.
//
// K and V tiles lie as [keys / 8][subtiles][8][kRowBytes]: a TMA box of any number of 8-row groups fills whole units,
// whatever the page size. Q lies as [subtiles][rows][kRowBytes], and so do K and V of kernels for head dims that end
// within a subtile (ColumnTail::kSubtiles).
#pragma once

#include "common/macros.h"

namespace broadhead::tma {

// A matrix of kCols columns in shared memory, in units of 8 rows. kSubtileRows: rows that each subtile has in one
// piece; 0: 8, the subtiles of a unit lie side by side.
template <class Element, int kCols, int kSubtileRows = 0>
struct TileLayout {
  static constexpr int kBytes = kCols * static_cast<int>(sizeof(Element));  // of a row
  static constexpr int kRowBytes = kBytes % 128 == 0 ? 128 : 64;            // of a row of a subtile
  static constexpr int kSubtiles = kBytes / kRowBytes;
  static constexpr int kSubtileCols = kRowBytes / static_cast<int>(sizeof(Element));
  static constexpr int kAtomBytes = 8 * kRowBytes;
  static constexpr int kSlabBytes = kSubtiles * kAtomBytes;  // 8 rows
  static constexpr bool kBySubtile = kSubtileRows > 0;
  static constexpr int kSlabStride = kBySubtile ? kAtomBytes : kSlabBytes;  // from 8 rows to the next 8
  static constexpr int kSubtileStride = kBySubtile ? kSubtileRows * kRowBytes : kAtomBytes;
  static constexpr int kSteps = kBytes / 32;  // wgmma steps along the columns
  static constexpr int kStepsPerSubtile = kRowBytes / 32;
  static_assert(kBytes % kRowBytes == 0);

  // Where step `step` along the columns begins, in units of subtiles that are `subtile_bytes` apart.
  BROADHEAD_DEVICE static constexpr int step_offset(int step, int subtile_bytes) {
    return step / kStepsPerSubtile * subtile_bytes + step % kStepsPerSubtile * 32;
  }
};

}  // namespace broadhead::tma
