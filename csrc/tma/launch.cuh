// Host side of every persistent TMA kernel: tensor maps, the division of the work, the launch, the combine.
#pragma once

#include <cstdint>
#include <numeric>
#include <type_traits>

#include <cutlass/numeric_types.h>

#include "common/math.h"
#include "host/launch.cuh"
#include "host/split_workspace.h"
#include "kernels/clear_counter.h"
#include "kernels/combine.h"
#include "tma/kernel_args.h"

namespace broadhead::tma {

// How a kernel wants its operands cut.
struct MapShape {
  int row_bytes;  // of q and k
  int row_bytes_v;
  int cluster;  // CTAs that load a box of each stage
  int k_rows;   // keys of a stage
  int k_subtiles;
  int v_rows;
  int v_subtiles;
  ColumnTail tail;
};

template <class Traits>
constexpr MapShape map_shape() {
  return {.row_bytes = Traits::KLayout::kRowBytes,
          .row_bytes_v = Traits::VLayout::kRowBytes,
          .cluster = Traits::kCluster,
          .k_rows = Traits::kTileN,
          .k_subtiles = Traits::KLayout::kSubtiles,
          .v_rows = Traits::kVKeys,
          .v_subtiles = Traits::VLayout::kSubtiles,
          .tail = Traits::kTail};
}

// Fills `maps`; a CUresult.
inline int make_maps(TensorMaps& maps, const AttnParams& params, const WorkPlan& plan, const MapShape& shape,
                     int element_bytes) {
  const bool packed_q = params.cu_seqlens_q != nullptr;
  const bool paged = params.page_table != nullptr;
  const bool packed_k = params.cu_seqlens_k != nullptr;
  const int rows_per_token = params.rows_per_token;
  const OperandShape q{params.q,
                       params.q_strides,
                       element_bytes,
                       params.head_dim,
                       packed_q ? params.total_q : params.seqlen_q,
                       params.num_heads_q,
                       packed_q ? 1 : params.batch};
  if (const int error = make_q_map(maps.q, q, rows_per_token, plan.rows_per_tile, shape.row_bytes)) return error;
  if (params.qv != nullptr) {
    OperandShape qv = q;
    qv.data = params.qv;
    qv.strides = params.qv_strides;
    qv.head_dim = params.head_dim_v;
    if (const int error = make_q_map(maps.qv, qv, rows_per_token, plan.rows_per_tile, shape.row_bytes)) return error;
  }
  maps.gather = paged && (params.page_size % 8 != 0 || params.leftpad_k != nullptr);
  const std::int64_t rows = paged ? params.page_size : packed_k ? params.total_k : params.seqlen_k;
  const std::int64_t batches = paged ? params.num_pages : packed_k ? 1 : params.num_kv_batches;
  const auto box_rows = [&](int stage_rows) {
    const int rows = stage_rows / shape.cluster;
    return paged ? std::gcd(params.page_size, rows) : rows;
  };
  const OperandShape k{params.k, params.k_strides, element_bytes, params.head_dim, rows, params.num_heads_kv, batches};
  const OperandShape v{params.v, params.v_strides,    element_bytes, params.head_dim_v,
                       rows,     params.num_heads_kv, batches};
  if (maps.gather) return 0;
  const KvStage k_stage{.row_bytes = shape.row_bytes,
                        .subtiles = shape.k_subtiles,
                        .box_rows = box_rows(shape.k_rows),
                        .stage_rows = shape.k_rows,
                        .all_columns = false,
                        .tail = shape.tail};
  const KvStage v_stage{.row_bytes = shape.row_bytes_v,
                        .subtiles = shape.v_subtiles,
                        .box_rows = box_rows(shape.v_rows),
                        .stage_rows = shape.v_rows,
                        .all_columns = shape.v_rows < shape.k_rows,
                        .tail = shape.tail};
  int error = make_kv_map(maps.k, k, k_stage);
  if (error == 0) error = make_kv_map(maps.v, v, v_stage);
  if (error != 0 && paged) {  // strides beyond what a map can say
    maps.gather = 1;
    error = 0;
  }
  return error;
}

inline WorkPlan make_plan(const AttnParams& params, int tile_m, int cluster) {
  const int rows_per_token = params.rows_per_token;
  WorkPlan plan;
  // A tile holds whole tokens, or an equal part of the rows of one.
  plan.rows_per_tile = rows_per_token % tile_m == 0 ? tile_m : tile_m / rows_per_token * rows_per_token;
  const long long rows = static_cast<long long>(params.seqlen_q) * rows_per_token;
  const long long per_cluster = static_cast<long long>(plan.rows_per_tile) * cluster;
  const int m_blocks = per_cluster > 0 ? static_cast<int>((rows + per_cluster - 1) / per_cluster) : 0;
  plan.grid = TileGrid(m_blocks, params.heads_in_grid, params.batch, params.heads_per_section);
  plan.ragged = params.cu_seqlens_q != nullptr || params.seqused_q != nullptr ||
                (params.scheduler_metadata != nullptr && params.num_splits > 1);
  const long long tiles = static_cast<long long>(m_blocks) * plan.grid.total_heads * params.num_splits;
  plan.tiles = tiles < 0x7fff0000LL ? static_cast<std::int32_t>(tiles) : -1;
  return plan;
}

// Tiles of each of `ctas` CTAs (clusters) at most where they take them in turn; 0: the call needs a counter, since its
// tiles differ by more than the grid's order tells, or are so many that the differences add up.
// PERF: clearing the counter is a launch of its own in front of the kernel.
inline int static_rounds(const AttnParams& params, const WorkPlan& plan, int ctas) {
  const int rounds = static_cast<int>((plan.tiles + ctas - 1ll) / ctas);
  if (rounds <= 1) return rounds;
  const MaskRule& rule = params.mask_rule;
  const bool one_length = !plan.ragged && params.seqused_k == nullptr && params.cu_seqlens_k == nullptr &&
                          params.prefix_lens == nullptr && params.sequence_masks == nullptr &&
                          params.leftpad_k == nullptr && params.num_splits == 1;
  const bool sees_all = rule.window_left < 0 && rule.window_right < 0 && rule.attention_chunk == 0;
  return one_length && (sees_all || rounds == 2) ? rounds : 0;
}

template <class Traits>
constexpr bool kCanHaveTail = Traits::KLayout::kSubtiles > 1 || Traits::VLayout::kSubtiles > 1;

// Whether K or V ends within a subtile of columns.
template <class Traits>
bool has_column_tail(const AttnParams& params) {
  constexpr int kElementBytes = sizeof(typename Traits::Element);
  return has_column_tail(params.head_dim, Traits::KLayout::kRowBytes, kElementBytes) ||
         has_column_tail(params.head_dim_v, Traits::VLayout::kRowBytes, kElementBytes);
}

template <class Traits>
std::int64_t persistent_workspace(const AttnParams& params) {
  return split_workspace_bytes(params, true);
}

// Launches `kernel`, the one of Traits, and what belongs in front of it and behind it.
template <class Traits>
int launch_persistent(void (*kernel)(const KernelArgs), const char* kernel_id, const AttnParams& params,
                      cudaStream_t stream, char* error, std::size_t error_size) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const CallReport report{kernel_id, params, kSmemBytes, error, error_size};
  if (params.head_dim > Traits::kHeadDim || params.head_dim_v > Traits::kHeadDimV) {
    return report.fail("head_dim", cudaErrorInvalidValue);
  }
  static PreparedKernel prepared;
  KernelLimits limits;
  if (prepared.prepare(kernel, Traits::kThreads, report, limits)) return 1;
  // Whole clusters that run at a time.
  int blocks = limits.multiprocessors * Traits::kMinBlocks / Traits::kCluster * Traits::kCluster;

  KernelArgs args{};
  args.params = params;
  if (!place_split_workspace(args.params, true)) return report.fail("workspace", cudaErrorInvalidValue);
  args.plan = make_plan(params, Traits::kTileM, Traits::kCluster);
  if (args.plan.rows_per_tile == 0) return report.fail("pack_gqa", cudaErrorInvalidValue);
  if (args.plan.tiles == 0) return 0;
  if (args.plan.tiles < 0) return report.fail("grid", cudaErrorInvalidValue);
  if (const int status =
          make_maps(args.maps, params, args.plan, map_shape<Traits>(), sizeof(typename Traits::Element))) {
    return report.fail(
        status == CUDA_ERROR_NOT_FOUND ? "cuTensorMapEncodeTiled: the driver is too old" : "cuTensorMapEncodeTiled",
        cudaErrorInvalidValue);
  }
  const long long wanted = args.plan.tiles * Traits::kCluster;
  if (params.max_blocks > 0 && blocks > params.max_blocks) {
    blocks = max_int(1, params.max_blocks / Traits::kCluster) * Traits::kCluster;
  }
  if (wanted < blocks) blocks = static_cast<int>(wanted);
  args.plan.rounds = static_rounds(params, args.plan, blocks / Traits::kCluster);
  if (args.plan.rounds == 0) {
    if (const int status = launch_clear_counter(args.params.tile_counter, stream)) {
      return report.fail("clear_counter", static_cast<cudaError_t>(status));
    }
  }
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(blocks)),
                          .threads = Traits::kThreads,
                          .smem_bytes = kSmemBytes,
                          .dependent = Traits::kDependentLaunch,
                          .cluster = Traits::kCluster};
  if (const cudaError_t status = launch_kernel(kernel, shape, stream, args)) return report.fail("launch", status);
  if (!Traits::kSplits || params.num_splits == 1) return 0;
  constexpr bool kIsFp16 = std::is_same_v<typename Traits::Element, cutlass::half_t>;
  return launch_split_combine(args.params, !kIsFp16, true, stream, error, error_size);
}

// The same with one of the kernels for plain calls (common/plain_call.h), which `Kernel` has as well, where the call is
// one. Kernel<Traits>::get() is the kernel of Traits.
template <template <class> class Kernel, class Traits>
int launch_either(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                  std::size_t error_size) {
  using Plain = PlainCall<Traits>;
  using Paged = PagedCallOr<Traits>;
  using Split = SplitCallOr<Traits>;
  if (!is_plain(params)) {
    return launch_persistent<Traits>(Kernel<Traits>::get(), kernel_id, params, stream, error, error_size);
  }
  if (params.num_splits > 1) {
    return launch_persistent<Split>(Kernel<Split>::get(), kernel_id, params, stream, error, error_size);
  }
  if (params.page_table == nullptr) {
    return launch_persistent<Plain>(Kernel<Plain>::get(), kernel_id, params, stream, error, error_size);
  }
  return launch_persistent<Paged>(Kernel<Paged>::get(), kernel_id, params, stream, error, error_size);
}

// The same with the kernel for head dims that end within a subtile of columns, where the call has such ones.
template <template <class> class Kernel, class Traits>
int launch_with_tail(const char* kernel_id, const AttnParams& params, cudaStream_t stream, char* error,
                     std::size_t error_size) {
  if constexpr (kCanHaveTail<Traits>) {
    if (has_column_tail<Traits>(params)) {
      return launch_either<Kernel, typename Traits::WithTail>(kernel_id, params, stream, error, error_size);
    }
  }
  return launch_either<Kernel, Traits>(kernel_id, params, stream, error, error_size);
}

}  // namespace broadhead::tma
