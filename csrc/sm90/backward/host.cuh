// Host side that all Hopper backward kernels share: the tensor maps, the grid and the launch of one kernel.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/backward_launch.cuh"
#include "sm90/backward/load.h"

namespace broadhead::sm90 {

using namespace tma;

template <class Traits>
std::int64_t backward_workspace(const AttnBwdParams& params) {
  return backward_prepare_bytes(params);
}

// Bytes of columns that neighbouring CTAs of a kernel may share: half of the L2 of 9.0.
constexpr long long kSectionBytes = 24LL << 20;

// A tensor of queries (q, dout) or of keys (k, v).
inline OperandShape operand_of(const AttnBwdParams& params, const void* data, const TensorStrides& strides, int columns,
                               bool queries) {
  const bool packed = (queries ? params.cu_seqlens_q : params.cu_seqlens_k) != nullptr;
  const std::int64_t rows =
      queries ? (packed ? params.total_q : params.seqlen_q) : (packed ? params.total_k : params.seqlen_k);
  return {
      data, strides, 2, columns, rows, queries ? params.num_heads_q : params.num_heads_kv, packed ? 1 : params.batch};
}

// `rows`: of a box. 0, or a CUresult.
template <class Layout>
int make_box_map(KvMap& map, const OperandShape& operand, int rows) {
  return make_kv_map(map, operand,
                     {.row_bytes = Layout::kRowBytes,
                      .subtiles = Layout::kSubtiles,
                      .box_rows = rows,
                      .stage_rows = rows,
                      .all_columns = false,
                      .tail = ColumnTail::kSubtiles});
}

template <class Traits>
int make_backward_maps(BackwardArgs& args) {
  constexpr bool kKeys = Traits::kKeys;
  const AttnBwdParams& params = args.params;
  const OperandShape q = operand_of(params, params.q, params.q_strides, params.head_dim, true);
  const OperandShape dout = operand_of(params, params.dout, params.dout_strides, params.head_dim_v, true);
  const OperandShape k = operand_of(params, params.k, params.k_strides, params.head_dim, false);
  const OperandShape v = operand_of(params, params.v, params.v_strides, params.head_dim_v, false);
  int error = make_box_map<typename Traits::FirstRows>(args.first_rows, kKeys ? k : q, Traits::kRows);
  if (!error) error = make_box_map<typename Traits::SecondRows>(args.second_rows, kKeys ? v : dout, Traits::kRows);
  if (!error) error = make_box_map<typename Traits::FirstCols>(args.first_cols, kKeys ? q : k, Traits::kCols);
  if (!error) error = make_box_map<typename Traits::SecondCols>(args.second_cols, kKeys ? dout : v, Traits::kCols);
  return error;
}

// Heads of a section, of whose tiles of rows `ctas` run at a time.
template <class Traits>
int section_heads(const AttnBwdParams& params, int tiles, int ctas) {
  const int group = params.heads_per_kv;
  const long long of_row = 2LL * (params.head_dim + params.head_dim_v);
  const long long of_kv_head = Traits::kKeys ? of_row * params.seqlen_q * group : of_row * params.seqlen_k;
  const long long tiles_of_kv_head = static_cast<long long>(tiles) * (Traits::kKeys ? 1 : group);
  const long long kv_heads =
      section_kv_heads(kSectionBytes / std::max(of_kv_head, 1LL), (ctas + tiles_of_kv_head / 2) / tiles_of_kv_head,
                       static_cast<long long>(params.num_heads_kv) * params.batch);
  return static_cast<int>(std::min(kv_heads * (Traits::kKeys ? 1 : group), 0x7fffffffLL));
}

// Launches `kernel`, a cluster of CTAs for each tile of `Traits::kRows` rows. `dq_sums`: of a fused kernel.
//
// The kernel of queries begins while the last tiles of keys are computed. It reads nothing of what the kernel of keys
// writes. It does read D and the extents of masks, which are complete by then: the kernel of keys is no dependent
// launch, so that it began behind the kernels that write these. PERF(H200, head_dim 192: 473 -> 481 TFLOP/s): nothing
// at 256; with clusters 1 % slower.
template <class Traits>
int launch_side(void (*kernel)(BackwardArgs), const AttnBwdParams& params, CallReport report, cudaStream_t stream,
                float* dq_sums = nullptr) {
  constexpr bool kKeys = Traits::kKeys;
  report.smem_bytes = sizeof(typename Traits::SharedStorage);
  static PreparedKernel prepared;
  KernelLimits limits;
  if (prepared.prepare(kernel, Traits::kThreads, report, limits)) return 1;
  BackwardArgs args{};
  args.params = params;
  args.tiles = ceil_div(kKeys ? params.seqlen_k : params.seqlen_q, Traits::kRows);
  args.dq_sums = dq_sums;
  const int heads = kKeys ? params.num_heads_kv : params.num_heads_q;
  const long long clusters = static_cast<long long>(args.tiles) * heads * params.batch;
  if (clusters == 0) return 0;
  if (clusters * Traits::kCluster > 0x7fffffffLL) return report.fail("grid", cudaErrorInvalidValue);
  args.heads_per_section = section_heads<Traits>(params, args.tiles, limits.multiprocessors / Traits::kCluster);
  if (const int status = make_backward_maps<Traits>(args)) {
    return report.fail(
        status == CUDA_ERROR_NOT_FOUND ? "cuTensorMapEncodeTiled: the driver is too old" : "cuTensorMapEncodeTiled",
        cudaErrorInvalidValue);
  }
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(clusters * Traits::kCluster)),
                          .threads = Traits::kThreads,
                          .smem_bytes = report.smem_bytes,
                          .dependent = !kKeys && Traits::kCluster == 1,
                          .cluster = Traits::kCluster};
  if (const cudaError_t status = launch_kernel(kernel, shape, stream, args)) {
    return report.fail(kKeys ? "launch of dk and dv" : "launch of dq", status);
  }
  return 0;
}

}  // namespace broadhead::sm90
