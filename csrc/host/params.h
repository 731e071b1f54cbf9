// The parameter structs of the kernels, one for each kind of call, and the C ABI of a kernel library.
//
// The structs are plain old data. The bindings (csrc/bindings) fill them once, and the kernels read them. Strides are
// in elements and always 64-bit, since page pools exceed 2^31 elements. A "nullable" pointer switches its feature off
// when it is null.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/divisor.h"

namespace broadhead {

// Raised whenever a field below is added, removed or changes meaning; libraries of another version are refused.
constexpr std::uint32_t kAbiVersion = 10;

// The element types of tensors whose type is not fixed by the kernel.
enum class DataType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8E4M3 = 3 };

enum class Direction : std::int32_t { kForward = 0, kBackward = 1 };

enum class Phase : std::int32_t { kPrefill = 0, kDecode = 1 };

struct TensorStrides {
  std::int64_t batch;  // sequence (dense), page (paged K/V); unused when the sequences are packed (varlen)
  std::int64_t row;    // token
  std::int64_t head;
};

// Strides of descales, which are one factor for each sequence and KV head (fp32 [B, Hkv]).
struct DescaleStrides {
  std::int64_t batch;
  std::int64_t head;
};

// Which keys a query sees by its position alone: the same for all sequences of a call but for `causal_by_sequence`
// (common/attention_mask.h).
struct MaskRule {
  std::int32_t window_left;      // -1: unbounded
  std::int32_t window_right;     // -1: unbounded; causal is 0
  std::int32_t attention_chunk;  // 0: off
};

// Masks that a call gives as values on the device (common/attention_mask.h). Strides are in elements.
struct MaskValues {
  const std::int32_t* query_ranges;  // [B, Sq, 2] or [T, 2]: query i also sees the keys [begin, end); nullable
  const std::int64_t* tree_mask;     // [B, Sq] or [T]: bit j: the query sees key seqlen_k - 64 + j; nullable
  const void* causal_by_sequence;    // [B] int32, or bool when causal_is_bool: window_right is 0 where set; nullable
  std::int64_t ranges_batch_stride;  // unused when varlen
  std::int64_t ranges_row_stride;
  std::int64_t tree_batch_stride;  // unused when varlen
  std::int64_t tree_row_stride;
  std::int32_t ranges_in_window;  // 1: a range keeps only keys that are no further back than window_left
  std::int32_t causal_is_bool;
};

struct SequenceMask;  // common/attention_mask.h

// One forward call. R = total query rows of a head: B * Sq (dense) or T (varlen). bf16/fp16 is the row's dtype.
struct AttnParams {
  std::uint32_t struct_size;
  std::uint32_t abi_version;

  const void* q;       // [B, Sq, Hq, D] or [T, Hq, D]
  const void* k;       // [B, Sk, Hkv, D], [Tk, Hkv, D] or [pages, page_size, Hkv, D]
  const void* v;       // as k with Dv
  void* out;           // [B, Sq, Hq, Dv] or [T, Hq, Dv], dtype of q
  float* softmax_lse;  // [B, Hq, Sq] or [Hq, T], natural log; nullable: not wanted
  // From the caller: workspace_bytes of scratch; null when there are none. The launcher lays it out: for splits (host/
  // split_workspace.h) as [num_splits, Hq, R, Dv] contiguous fp32 and what follows it; of decode kernels
  // decode/workspace.h.
  float* out_partial;
  float* lse_partial;  // [num_splits, Hq, R] contiguous fp32, natural log; set by the launcher
  TensorStrides q_strides;
  TensorStrides k_strides;
  TensorStrides v_strides;
  TensorStrides out_strides;
  std::int64_t lse_batch_stride;  // unused when varlen
  std::int64_t lse_head_stride;
  const void* qv;  // [B, Sq, Hq, Dv] or [T, Hq, Dv]: scores are (q k^T + qv v^T) * softmax_scale; nullable
  TensorStrides qv_strides;
  // The descales of 8-bit q, k and v; nullable: the factor is 1. A head of q has the descale of its KV head.
  const float* q_descale;
  const float* k_descale;
  const float* v_descale;
  DescaleStrides q_descale_strides;
  DescaleStrides k_descale_strides;
  DescaleStrides v_descale_strides;

  const std::int32_t* cu_seqlens_q;        // [B + 1], nullable: dense q
  const std::int32_t* cu_seqlens_k;        // [B + 1], nullable: dense or paged k
  const std::int32_t* seqused_q;           // [B], nullable
  const std::int32_t* seqused_k;           // [B], nullable
  const std::int32_t* leftpad_k;           // [B], nullable: keys [leftpad, seqused) of the cache are the sequence
  const std::int32_t* kv_batch_idx;        // [B], nullable: row of the cache (or of the page table) for sequence b
  const std::int32_t* page_table;          // [B or more, max_pages], nullable
  const std::int32_t* prefix_lens;         // [B], nullable
  const void* sinks;                       // [Hq] fp32, or dtype of q when sinks_are_fp32 == 0; nullable
  const std::int32_t* scheduler_metadata;  // nullable; layout in common/scheduler_metadata.h
  std::int64_t page_table_batch_stride;
  std::int32_t* tile_counter;  // [1] of the workspace, set and cleared by the launcher of kernels that count tiles

  std::int32_t batch;
  std::int32_t seqlen_q;        // max over the batch
  std::int32_t seqlen_k;        // max over the batch; page_table.size(1) * page_size when paged
  std::int64_t total_q;         // R
  std::int64_t total_k;         // rows of packed k (cu_seqlens_k), else 0
  std::int64_t num_pages;       // pages of the pool, at most 2^31, as page ids are int32; 0: not paged
  std::int64_t num_kv_batches;  // k.size(0) of dense k; rows of the page table when paged; 0: packed
  std::int32_t num_heads_q;
  std::int32_t num_heads_kv;
  std::int32_t head_dim;
  std::int32_t head_dim_v;
  std::int32_t page_size;  // 0: not paged

  MaskRule mask_rule;
  float softmax_scale;
  float softcap;  // 0: off
  std::int32_t sinks_are_fp32;

  std::int32_t num_splits;  // >= 1; the grid's bound. With metadata a sequence uses min(metadata, num_splits);
                            // decode kernels: at most so many splits of a tile, 0: any number
  std::int32_t pack_gqa;    // 1: the query heads of one KV head share a tile
  // Derived by the library (host/derived.h).
  Divisor rows_per_token;              // query rows of a token in a tile: heads of a KV head when packed, else 1
  std::int32_t heads_in_grid;          // KV heads when packed
  std::int32_t heads_per_kv;           // heads in the grid that share a KV head
  const SequenceMask* sequence_masks;  // [B], what mask_values gives each sequence: kernels read nothing else of it.
                                       // Null: it gives nothing. It is the first part of the workspace
                                       // (kernels/mask_extents.h), and kernels get the rest
  std::int32_t metadata_tag;           // what scheduler_metadata must carry for its split counts to be used
  std::int32_t heads_per_section;      // heads whose K/V share the L2 at a time; 0: all
  std::int32_t max_blocks;             // persistent kernels: the most CTAs that sm_margin allows; 0: no limit
  std::int32_t cell_blocks;            // decode kernels: fixed splits of so many times 64 keys; 0: stream-K
  DataType q_dtype;              // read by kernels of 8-bit K and V, which take any; out is fp16 for fp16 q, else bf16
  std::int64_t workspace_bytes;  // as broadhead_forward_workspace says

  // Decode kernels: all query tokens also see the first shared_seqlen_k keys of the pages of one more page table, in
  // front of the keys of their own sequences. Token t of the call lies at q + t * q_strides.row, or at q + t *
  // q_strides.batch where dense q has one token a sequence. Such calls use stream-K (num_splits 0 or > 1, no fixed
  // splits), are paged, and have no window, attention_chunk, seqused_q or prefix_lens.
  const std::int32_t* shared_page_table;  // [pages], nullable
  std::int32_t shared_seqlen_k;           // 0: there are none

  MaskValues mask_values;  // behind what every call reads
};

// One backward call: the gradients of attention, from out and softmax_lse as they are given. With P = exp(S -
// softmax_lse) and D = rowsum(dout * out) - dlse they follow from dS = P * (dP - D). R = total query rows of a head: B
// * Sq (dense) or T (varlen). A row whose softmax_lse is -inf has no gradient, whatever q, out and dout hold there.
// Rows of dq, dk and dv that no sequence owns are cleared by the caller, and the kernels leave them alone; all others
// are written.
struct AttnBwdParams {
  std::uint32_t struct_size;
  std::uint32_t abi_version;

  const void* q;             // [B, Sq, Hq, D] or [T, Hq, D]
  const void* k;             // [B, Sk, Hkv, D] or [Tk, Hkv, D]
  const void* v;             // as k with Dv
  const void* out;           // as q with Dv
  const void* dout;          // as out
  const float* softmax_lse;  // [B, Hq, Sq] or [Hq, T], natural log
  const float* dlse;         // as softmax_lse; nullable: 0
  void* dq;                  // as q
  void* dk;                  // as k
  void* dv;                  // as v
  float* dsinks;             // [Hq]; null exactly when sinks is
  float* delta;              // [Hq, R] contiguous, scratch: D of each row
  void* workspace;           // workspace_bytes of scratch, aligned to 256 bytes; null when there are none
  TensorStrides q_strides;
  TensorStrides k_strides;
  TensorStrides v_strides;
  TensorStrides out_strides;
  TensorStrides dout_strides;
  TensorStrides dq_strides;
  TensorStrides dk_strides;
  TensorStrides dv_strides;
  std::int64_t lse_batch_stride;  // unused when varlen
  std::int64_t lse_head_stride;
  std::int64_t dlse_batch_stride;  // likewise
  std::int64_t dlse_head_stride;

  const std::int32_t* cu_seqlens_q;  // [B + 1], nullable: dense q
  const std::int32_t* cu_seqlens_k;  // [B + 1], nullable: dense k
  const std::int32_t* seqused_q;     // [B], nullable
  const std::int32_t* seqused_k;     // [B], nullable
  const std::int32_t* prefix_lens;   // [B], nullable
  const void* sinks;                 // [Hq] fp32, or dtype of q when sinks_are_fp32 == 0; nullable

  std::int32_t batch;
  std::int32_t seqlen_q;  // max over the batch
  std::int32_t seqlen_k;  // max over the batch
  std::int64_t total_q;   // R
  std::int64_t total_k;   // rows of packed k (cu_seqlens_k), else B * Sk
  std::int32_t num_heads_q;
  std::int32_t num_heads_kv;
  std::int32_t head_dim;
  std::int32_t head_dim_v;

  MaskRule mask_rule;
  float softmax_scale;
  float softcap;  // 0: off
  std::int32_t sinks_are_fp32;

  // Derived by the library (host/derived.h).
  std::int32_t heads_per_kv;           // query heads that share a KV head
  const SequenceMask* sequence_masks;  // as AttnParams'

  std::int32_t deterministic;  // 1: every sum in an order that is the same in every run
  std::int32_t num_splits;  // partial results of dk and dv that are added up, by queries or by heads; 0: as the kernel
                            // chooses
  std::int32_t max_blocks;  // of a persistent kernel: what sm_margin leaves; 0: all
  std::int64_t workspace_bytes;  // as broadhead_backward_workspace says

  MaskValues mask_values;  // without a tree_mask
};

// One get_scheduler_metadata call.
struct SchedulerMetadataParams {
  std::uint32_t struct_size;
  std::uint32_t abi_version;
  std::int32_t* metadata;            // [1 + 4 * round_up(batch, 4)]
  const std::int32_t* seqused_k;     // [B], nullable: every sequence is seqlen_k long
  const std::int32_t* cu_seqlens_k;  // [B + 1], nullable
  const std::int32_t* leftpad_k;     // [B], nullable
  const std::int32_t* cu_seqlens_q;  // [B + 1], nullable
  const std::int32_t* seqused_q;     // [B], nullable
  std::int32_t batch;
  std::int32_t seqlen_q;
  std::int32_t seqlen_k;
  std::int32_t seqlen_k_new;  // keys that this call will append to every sequence
  std::int32_t window_left;
  std::int32_t window_right;
  std::int32_t attention_chunk;
  std::int32_t rows_per_token;  // query rows of one token in a tile: Hq / Hkv when packed, else 1
  std::int32_t heads_in_grid;   // Hkv when packed, else Hq
  std::int32_t tile_m;
  std::int32_t tile_n;
  std::int32_t num_splits;   // bound
  std::int32_t target_ctas;  // CTAs that fill the device once
  std::int32_t metadata_tag;
};

// flash_attn_combine: merges partial results of any producer.
struct CombineParams {
  std::uint32_t struct_size;
  std::uint32_t abi_version;
  const float* out_partial;  // [splits, rows, heads, Dv], strides below
  const float* lse_partial;  // [splits, rows, heads]
  void* out;                 // [rows, heads, Dv]
  float* softmax_lse;        // [rows, heads] by strides; nullable
  std::int64_t out_partial_split_stride, out_partial_row_stride, out_partial_head_stride;
  std::int64_t lse_partial_split_stride, lse_partial_row_stride, lse_partial_head_stride;
  std::int64_t out_row_stride, out_head_stride;
  std::int64_t lse_row_stride, lse_head_stride;
  std::int64_t rows;
  std::int32_t heads;
  std::int32_t head_dim_v;
  std::int32_t num_splits;
  std::int32_t out_dtype;  // 0 fp32, 1 bf16, 2 fp16
};

// One append of new keys and values to a cache, with the rotary embedding of q and the new keys. The stride of a
// dimension of one element is 0.
struct AppendKvParams {
  std::uint32_t struct_size;
  std::uint32_t abi_version;
  void* k_cache;           // [rows, S, Hkv, D] or [pages, page_size, Hkv, D], cache_dtype
  void* v_cache;           // as k_cache with Dv
  const void* k_new;       // [B, S_new, Hkv, D] or [T_new, Hkv, D], dtype
  const void* v_new;       // as k_new with Dv
  const void* q;           // [B, Sq, Hq, D] or [T, Hq, D], dtype; nullable: only new keys are rotated
  void* q_out;             // as q; nullable with q
  const void* rotary_cos;  // [positions, rotary_dim / 2], angles_dtype; nullable: nothing is rotated
  const void* rotary_sin;  // likewise
  TensorStrides k_cache_strides;
  TensorStrides v_cache_strides;
  TensorStrides k_new_strides;
  TensorStrides v_new_strides;
  TensorStrides q_strides;
  TensorStrides q_out_strides;
  std::int64_t cos_stride;  // from a position to the next
  std::int64_t sin_stride;
  // 16-bit new keys and values are divided by these when they become 8-bit; nullable: 1.
  const float* k_descale;
  const float* v_descale;
  DescaleStrides k_descale_strides;
  DescaleStrides v_descale_strides;

  const std::int32_t* cache_seqlens;     // [B], before the append
  std::int32_t* seqlens_out;             // [B], after it
  const std::int32_t* rotary_seqlens;    // [B], nullable: position of the first new token is cache_seqlens
  const std::int32_t* cu_seqlens_q;      // [B + 1], nullable: dense q
  const std::int32_t* cu_seqlens_k_new;  // [B + 1], nullable: dense k_new
  const std::int32_t* page_table;        // [rows, max_pages], nullable
  const std::int32_t* cache_batch_idx;   // [B], nullable: row of the cache (or of the page table) for sequence b
  std::int64_t page_table_batch_stride;

  std::int64_t num_blocks;  // k_cache.size(0): pages, or rows of the cache
  std::int64_t num_owners;  // rows of the page table, or of the cache
  std::int32_t block_size;  // k_cache.size(1): page_size, or S
  std::int32_t max_pages;   // 0: not paged
  std::int32_t batch;
  std::int32_t seqlen_q;    // tokens of a sequence in dense q
  std::int32_t seqlen_new;  // tokens of a sequence in dense k_new
  std::int32_t total_q;     // tokens of q: B * Sq or T
  std::int32_t total_new;   // tokens of k_new: B * S_new or T_new
  std::int32_t num_heads_q;
  std::int32_t num_heads_kv;
  std::int32_t head_dim;
  std::int32_t head_dim_v;
  std::int32_t rotary_dim;  // 0: nothing is rotated
  std::int32_t num_positions;
  std::int32_t rotary_interleaved;
  std::int32_t causal_or_local;  // q token i is at the position of new token i; else all are at that of the first
  DataType angles_dtype;         // fp32, bf16 or fp16
  DataType dtype;
  DataType cache_dtype;
};

// merge_attn_states: two attention results of the same queries over disjoint keys become one.
struct MergeStatesParams {
  std::uint32_t struct_size;
  std::uint32_t abi_version;
  const void* out_a;   // [B, S, H, Dv] or [T, H, Dv], dtype
  const void* out_b;   // likewise
  void* out;           // likewise; may be out_a or out_b
  const float* lse_a;  // [B, H, S] or [H, T], natural log; -inf: the part saw no key, its output counts for nothing
  const float* lse_b;  // likewise
  float* softmax_lse;  // likewise
  TensorStrides out_a_strides;
  TensorStrides out_b_strides;
  TensorStrides out_strides;
  TensorStrides lse_a_strides;
  TensorStrides lse_b_strides;
  TensorStrides lse_strides;
  std::int32_t batch;   // 1 when packed
  std::int32_t seqlen;  // T when packed
  std::int32_t heads;
  std::int32_t head_dim_v;
  DataType dtype;
};

// What a kernel is: its row of python/broadhead/support.py.
struct KernelInfo {
  std::uint32_t struct_size;
  std::uint32_t abi_version;
  const char* id;
  Direction direction;
  Phase phase;
  DataType dtype;           // of q
  DataType kv_dtype;        // of k and v
  std::int32_t head_dim;    // the largest
  std::int32_t head_dim_v;  // the largest
  std::int32_t tile_m;      // query rows
  std::int32_t tile_n;      // keys
  const char* features;     // of support.py, a space between two
};

}  // namespace broadhead

#if defined(_WIN32)
#define BROADHEAD_EXPORT extern "C" __declspec(dllexport)
#else
#define BROADHEAD_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The C ABI. Every entry that launches returns 0, or non-zero with a NUL-terminated text in `error` (kernel name,
// shape, CUDA's words). Kernels are named by the id of their row in python/broadhead/support.py.
BROADHEAD_EXPORT std::uint32_t broadhead_abi_version();
BROADHEAD_EXPORT const char* broadhead_build_archs();  // as compiled: "80;90"
BROADHEAD_EXPORT int broadhead_cuda_version();         // CUDART_VERSION of the build: 13000
BROADHEAD_EXPORT int broadhead_kernel_count();
BROADHEAD_EXPORT const broadhead::KernelInfo* broadhead_kernel_info(int index);  // null: no such index
// Bytes of workspace that a kernel needs for a call whose other fields are `params`, on the current device. Pointers
// are not read, but for whether they are null. -1: no such kernel of that direction, a block of another version, no
// device.
BROADHEAD_EXPORT std::int64_t broadhead_forward_workspace(int index, const broadhead::AttnParams* params);
BROADHEAD_EXPORT std::int64_t broadhead_backward_workspace(int index, const broadhead::AttnBwdParams* params);
BROADHEAD_EXPORT int broadhead_forward(int index, const broadhead::AttnParams* params, void* stream, char* error,
                                       std::size_t error_size);
BROADHEAD_EXPORT int broadhead_backward(int index, const broadhead::AttnBwdParams* params, void* stream, char* error,
                                        std::size_t error_size);
BROADHEAD_EXPORT int broadhead_scheduler_metadata(const broadhead::SchedulerMetadataParams* params, void* stream,
                                                  char* error, std::size_t error_size);
BROADHEAD_EXPORT int broadhead_combine(const broadhead::CombineParams* params, void* stream, char* error,
                                       std::size_t error_size);
BROADHEAD_EXPORT int broadhead_append_kv(const broadhead::AppendKvParams* params, void* stream, char* error,
                                         std::size_t error_size);
BROADHEAD_EXPORT int broadhead_merge_states(const broadhead::MergeStatesParams* params, void* stream, char* error,
                                            std::size_t error_size);
