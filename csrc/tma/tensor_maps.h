// TMA descriptors of q, k and v for every layout of the contract, built on the host, and their coordinates.
//
// K/V dimensions: (column in a subtile, row, subtile, 8-row group, x). Row and group overlap on purpose: a box of
// groups starts at any row and lands in shared memory as 8-row units, [keys / 8][subtiles][8][subtile]. Only the row
// dimension has a bound; a box that would cross it is loaded group by group. x counts heads and sequences (or pages)
// together, in steps of the greatest common divisor of their strides.
//
// Such a box can not end within a subtile: nothing bounds column and subtile together. Where head_dim does, boxes of
// one subtile are taken, whose column dimension ends at head_dim; TMA fills the rest with zeros. See ColumnTail.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <numeric>

#include "common/math.h"
#include "host/params.h"

namespace broadhead::tma {

// What a kernel does where head_dim ends within a subtile of columns (and is larger than one).
enum class ColumnTail {
  kNone,      // it is not for such calls
  kSubtiles,  // stages lie as [subtiles][keys][subtile], filled by a box a subtile with all its rows
  kGroups,    // the last columns come by boxes of 8 rows of one subtile: for stages of few keys
};

struct KvMap {
  CUtensorMap box;    // box_rows rows, all columns of a stage; kSubtiles: one subtile of them
  CUtensorMap group;  // 8 rows, all columns of a stage; where head_dim ends within a subtile one subtile of them
  std::int32_t head_step;
  std::int32_t batch_step;
  std::int32_t rows;      // bound of the row dimension
  std::int32_t box_rows;  // a multiple of 8; a box lies in one page
  std::int32_t boxes;     // of a stage
  // kGroups: those in front of a tail; 0: there is none. A box then holds all rows and columns of a stage without a
  // tail (K), or 8 rows of these subtiles (V, whose stages are all columns of some keys).
  std::int32_t whole_subtiles;
};

struct QMap {
  CUtensorMap map;  // (column, head of a token, token, x): one subtile of columns of a tile
  std::int32_t head_step;
  std::int32_t batch_step;
};

struct TensorMaps {
  QMap q;
  QMap qv;  // when there is one
  KvMap k;
  KvMap v;
  std::int32_t gather;  // 1: no map fits K/V (pages without whole 8-row groups): the producer's warps copy
};

// What the encoder needs to know of one operand.
struct OperandShape {
  const void* data;
  TensorStrides strides;  // in elements
  int element_bytes;
  int head_dim;
  std::int64_t rows;
  int heads;
  std::int64_t batches;  // sequences or pages
};

struct Step {
  std::int64_t unit;  // elements of one step of x
  std::int64_t head;
  std::int64_t batch;
  std::int64_t size;  // of x
};

inline Step make_step(std::int64_t head_stride, std::int64_t batch_stride, int heads, std::int64_t batches) {
  if (heads <= 1) head_stride = 0;
  if (batches <= 1) batch_stride = 0;
  const std::int64_t unit = std::gcd(head_stride, batch_stride);
  if (unit == 0) return {0, 0, 0, 1};
  return {unit, head_stride / unit, batch_stride / unit,
          (heads - 1) * (head_stride / unit) + (batches - 1) * (batch_stride / unit) + 1};
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver, so that the library does not link against it; null when the driver is too old.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) entry = nullptr;
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// A five-dimensional map; sizes and strides in elements, strides[i] that of dimension i + 1. 0 on success.
inline int encode(CUtensorMap& map, const OperandShape& operand, const std::int64_t (&sizes)[5],
                  const std::int64_t (&strides)[4], const int (&box)[5], int row_bytes) {
  const EncodeTiled function = encode_tiled();
  if (function == nullptr) return CUDA_ERROR_NOT_FOUND;
  cuuint64_t size[5], stride[4];
  cuuint32_t box_size[5], ones[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < 5; ++i) {
    if (sizes[i] > 0xffffffffLL) return CUDA_ERROR_INVALID_VALUE;
    size[i] = static_cast<cuuint64_t>(sizes[i] > 0 ? sizes[i] : 1);
    box_size[i] = static_cast<cuuint32_t>(box[i]);
  }
  // The encoder wants multiples of 16; that of a dimension of size 1 may be anything.
  for (int i = 0; i < 4; ++i) {
    stride[i] = static_cast<cuuint64_t>(size[i + 1] > 1 ? strides[i] * operand.element_bytes : 16);
  }
  const CUtensorMapDataType type =
      operand.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // Rows that are no whole 32-byte sectors touch a sector more each, and the L2 would fetch twice of it.
  // PERF(H200, 256 -> 128 bytes, TFLOP/s: head_dim 72 380 -> 408, 88 421 -> 451, 104 469 -> 498, 120 causal 475 -> 506;
  // multiples of 16 within noise)
  const bool whole_sectors = operand.head_dim * operand.element_bytes % 32 == 0;
  return function(&map, type, 5, const_cast<void*>(operand.data), size, stride, box_size, ones,
                  CU_TENSOR_MAP_INTERLEAVE_NONE,
                  row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                  whole_sectors ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// How K or V is cut: subtiles of row_bytes, `subtiles` of them and `box_rows` keys a box.
struct KvStage {
  int row_bytes;
  int subtiles;
  int box_rows;
  int stage_rows;
  bool all_columns;  // of some of an n_block's keys; else some columns of all of them
  ColumnTail tail;
};

// Whether columns end within a subtile and are more than one.
inline bool has_column_tail(int head_dim, int row_bytes, int element_bytes) {
  const int subtile = row_bytes / element_bytes;
  return head_dim > subtile && head_dim % subtile != 0;
}

inline int make_kv_map(KvMap& map, const OperandShape& operand, const KvStage& stage) {
  const int subtile = stage.row_bytes / operand.element_bytes;
  const Step x = make_step(operand.strides.head, operand.strides.batch, operand.heads, operand.batches);
  const bool has_tail = has_column_tail(operand.head_dim, stage.row_bytes, operand.element_bytes);
  // The stride of a single row may be anything.
  const std::int64_t row = operand.rows > 1 ? operand.strides.row : round_up(operand.head_dim, 16);
  const std::int64_t strides[4] = {row, subtile, 8 * row, x.unit};
  map.head_step = static_cast<std::int32_t>(x.head);
  map.batch_step = static_cast<std::int32_t>(x.batch);
  map.rows = static_cast<std::int32_t>(operand.rows);
  map.box_rows = stage.box_rows;
  map.boxes = stage.stage_rows / stage.box_rows;
  const int whole_subtiles = operand.head_dim / subtile;
  map.whole_subtiles = has_tail && stage.tail == ColumnTail::kGroups ? whole_subtiles : 0;
  if (x.size > 0x7fffffffLL) return CUDA_ERROR_INVALID_VALUE;
  const auto encode_columns = [&](CUtensorMap& to, int rows) {
    return encode(to, operand, {operand.head_dim, operand.rows, 1, 1, x.size}, strides, {subtile, rows, 1, 1, 1},
                  stage.row_bytes);
  };
  if (stage.tail == ColumnTail::kSubtiles) return encode_columns(map.box, stage.box_rows);
  int groups = stage.box_rows / 8;
  int box_subtiles = stage.subtiles;
  const std::int64_t columns = min_int(operand.head_dim, subtile);
  const std::int64_t subtiles = max_int(whole_subtiles, 1);
  if (has_tail) {
    if (stage.tail == ColumnTail::kNone) return CUDA_ERROR_INVALID_VALUE;
    if (const int error = encode_columns(map.group, 8)) return error;
    box_subtiles = min_int(whole_subtiles, stage.subtiles);
    if (stage.all_columns) groups = 1;
  } else if (const int error = encode(map.group, operand, {columns, operand.rows, subtiles, 1, x.size}, strides,
                                      {subtile, 8, box_subtiles, 1, 1}, stage.row_bytes)) {
    return error;
  }
  return encode(map.box, operand, {columns, operand.rows, subtiles, groups, x.size}, strides,
                {subtile, 8, box_subtiles, groups, 1}, stage.row_bytes);
}

// A tile of q: `rows` rows, which are tokens of `rows_per_token` heads or a part of one; one subtile of columns a box.
inline int make_q_map(QMap& map, const OperandShape& operand, int rows_per_token, int rows, int row_bytes) {
  const int subtile = row_bytes / operand.element_bytes;
  const int heads = operand.heads / rows_per_token;
  const int box_heads = min_int(rows_per_token, rows);
  const Step x = make_step(operand.strides.head * rows_per_token, operand.strides.batch, heads, operand.batches);
  map.head_step = static_cast<std::int32_t>(x.head);
  map.batch_step = static_cast<std::int32_t>(x.batch);
  if (x.size > 0x7fffffffLL) return CUDA_ERROR_INVALID_VALUE;
  return encode(map.map, operand, {operand.head_dim, rows_per_token, operand.rows, 1, x.size},
                {operand.strides.head, operand.strides.row, 0, x.unit}, {subtile, box_heads, rows / box_heads, 1, 1},
                row_bytes);
}

}  // namespace broadhead::tma
