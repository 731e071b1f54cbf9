// A kernel library without kernels: keeps the argument blocks of its launches as text, so that a test can read what was
// packed.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

#include "host/params.h"
#include "host/split_workspace.h"

#ifndef STUB_ABI_VERSION
#define STUB_ABI_VERSION broadhead::kAbiVersion
#endif

namespace {

// The last launches, the newest one at the end: "entry=NAME", then a line for each field.
constexpr std::size_t kMostLaunches = 64;
std::deque<std::string> launches;
std::mutex launches_mutex;

// While it lives, what is put belongs to one launch.
class Launch {
 public:
  explicit Launch(const char* entry) : lock_(launches_mutex) {
    if (launches.size() == kMostLaunches) launches.pop_front();
    launches.push_back(std::string("entry=") + entry + "\n");
  }

 private:
  std::lock_guard<std::mutex> lock_;
};

using broadhead::DataType;
using broadhead::Direction;
using broadhead::KernelInfo;
using broadhead::Phase;

// Ids that say nothing of what the kernel is: nobody reads it out of them.
constexpr KernelInfo kernel(const char* id, Direction direction, Phase phase, DataType dtype, DataType kv_dtype) {
  return {sizeof(KernelInfo), STUB_ABI_VERSION, id, direction, phase, dtype, kv_dtype, 64, 64, 16, 32, "causal lse"};
}

constexpr auto kForward = Direction::kForward;
const KernelInfo kKernels[] = {
#ifdef STUB_KERNELS
#include STUB_KERNELS
#else
    kernel("sm80_fwd_d64_bf16", kForward, Phase::kPrefill, DataType::kBFloat16, DataType::kBFloat16),
    kernel("counting", kForward, Phase::kPrefill, DataType::kFloat16, DataType::kFloat16),
    kernel("prefill_8_bit", kForward, Phase::kPrefill, DataType::kFloat8E4M3, DataType::kFloat8E4M3),
    kernel("decode_bf16", kForward, Phase::kDecode, DataType::kBFloat16, DataType::kBFloat16),
    kernel("decode_e4m3", kForward, Phase::kDecode, DataType::kFloat8E4M3, DataType::kFloat8E4M3),
    kernel("decode_bf16_kve4m3", kForward, Phase::kDecode, DataType::kBFloat16, DataType::kFloat8E4M3),
    kernel("decode_fp16_kve4m3", kForward, Phase::kDecode, DataType::kFloat16, DataType::kFloat8E4M3),
    kernel("backward_bf16", Direction::kBackward, Phase::kPrefill, DataType::kBFloat16, DataType::kBFloat16),
#endif
};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

bool counts_tiles(int index) { return std::strcmp(kKernels[index].id, "counting") == 0; }

void put(const char* name, const std::string& value) { launches.back() += std::string(name) + "=" + value + "\n"; }

void put(const char* name, long long value) { put(name, std::to_string(value)); }

void put(const char* name, const void* pointer) {
  put(name, static_cast<long long>(reinterpret_cast<std::intptr_t>(pointer)));
}

void put(const char* name, const broadhead::TensorStrides& strides) {
  put(name, std::to_string(strides.batch) + "," + std::to_string(strides.row) + "," + std::to_string(strides.head));
}

void put(const char* name, const broadhead::DescaleStrides& strides) {
  put(name, std::to_string(strides.batch) + "," + std::to_string(strides.head));
}

// A launch that waits, as launches do while the queue of a device is full: of `size` 77.
void wait_if_asked(long long size) {
  if (size == 77) std::this_thread::sleep_for(std::chrono::milliseconds(300));
}

void put_float(const char* name, float value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.9g", static_cast<double>(value));
  put(name, std::string(digits));
}

void put_rule(const broadhead::MaskRule& rule) {
  put("window_left", rule.window_left);
  put("window_right", rule.window_right);
  put("attention_chunk", rule.attention_chunk);
}

#define PUT(field) put(#field, p.field)

void put_values(const broadhead::MaskValues& p) {
  PUT(query_ranges), PUT(tree_mask), PUT(causal_by_sequence), PUT(ranges_batch_stride), PUT(ranges_row_stride);
  PUT(tree_batch_stride), PUT(tree_row_stride), PUT(ranges_in_window), PUT(causal_is_bool);
}

}  // namespace

// The launches since they were asked for last, an empty line behind each; `forget` drops them.
BROADHEAD_EXPORT const char* stub_launches(int forget) {
  const std::lock_guard<std::mutex> lock(launches_mutex);
  static std::string text;
  text.clear();
  for (const std::string& launch : launches) text += launch + "\n";
  if (forget) launches.clear();
  return text.c_str();
}

std::uint32_t broadhead_abi_version() { return STUB_ABI_VERSION; }
const char* broadhead_build_archs() { return "80;90"; }
int broadhead_cuda_version() { return 13010; }
int broadhead_kernel_count() { return kKernelCount; }
const KernelInfo* broadhead_kernel_info(int index) { return &kKernels[index]; }

std::int64_t broadhead_forward_workspace(int index, const broadhead::AttnParams* params) {
  if (params->batch <= 0 || params->q == nullptr) return -1;  // whatever it depends on is there by now
  if (kKernels[index].phase == Phase::kDecode) return 4ll * params->max_blocks;
  return broadhead::split_workspace_bytes(*params, counts_tiles(index));
}

int broadhead_forward(int index, const broadhead::AttnParams* params, void* stream, char* error,
                      std::size_t error_size) {
  const broadhead::AttnParams& p = *params;
  wait_if_asked(p.mask_rule.attention_chunk);
  const Launch launch("forward");
  if (p.softcap < 0 || p.out == reinterpret_cast<void*>(0xBAD << 12)) {
    std::snprintf(error, error_size, "%s: launch: the stub was asked to fail", kKernels[index].id);
    return 1;
  }
  put("index", index);
  put("stream", stream);
  put("struct_size_fits", p.struct_size == sizeof(broadhead::AttnParams));
  PUT(q), PUT(k), PUT(v), PUT(out), PUT(softmax_lse), PUT(out_partial), PUT(lse_partial);
  PUT(q_strides), PUT(k_strides), PUT(v_strides), PUT(out_strides), PUT(lse_batch_stride), PUT(lse_head_stride);
  PUT(cu_seqlens_q), PUT(cu_seqlens_k), PUT(seqused_q), PUT(seqused_k), PUT(leftpad_k), PUT(kv_batch_idx);
  PUT(page_table), PUT(prefix_lens), PUT(sinks), PUT(scheduler_metadata), PUT(page_table_batch_stride);
  PUT(batch), PUT(seqlen_q), PUT(seqlen_k), PUT(total_q), PUT(num_heads_q), PUT(num_heads_kv), PUT(head_dim);
  PUT(head_dim_v), PUT(page_size), put_rule(p.mask_rule), put_values(p.mask_values), PUT(sinks_are_fp32);
  PUT(num_splits), PUT(pack_gqa), PUT(metadata_tag), PUT(heads_per_section), PUT(max_blocks), PUT(total_k),
      PUT(num_pages), PUT(num_kv_batches), PUT(tile_counter), PUT(qv);
  PUT(qv_strides), PUT(q_descale), PUT(k_descale), PUT(v_descale), PUT(q_descale_strides), PUT(k_descale_strides);
  PUT(v_descale_strides), PUT(cell_blocks), PUT(workspace_bytes), PUT(shared_page_table), PUT(shared_seqlen_k);
  put("q_dtype", static_cast<long long>(p.q_dtype));
  put_float("softmax_scale", p.softmax_scale);
  put_float("softcap", p.softcap);
  return 0;
}

std::int64_t broadhead_backward_workspace(int index, const broadhead::AttnBwdParams* params) {
  const broadhead::AttnBwdParams& p = *params;
  // Whatever the workspace depends on is there by now.
  const bool packed = p.batch > 0 && p.total_q > 0 && p.total_k > 0 && p.num_heads_kv > 0 && p.head_dim > 0;
  return kKernels[index].direction == Direction::kBackward && packed ? 1000 * p.num_splits : -1;
}

int broadhead_backward(int index, const broadhead::AttnBwdParams* params, void* stream, char* error,
                       std::size_t error_size) {
  const broadhead::AttnBwdParams& p = *params;
  wait_if_asked(p.mask_rule.attention_chunk);
  const Launch launch("backward");
  if (p.softcap < 0) {
    std::snprintf(error, error_size, "%s: launch: the stub was asked to fail", kKernels[index].id);
    return 1;
  }
  put("index", index);
  put("stream", stream);
  put("struct_size_fits", p.struct_size == sizeof(broadhead::AttnBwdParams));
  PUT(q), PUT(k), PUT(v), PUT(out), PUT(dout), PUT(softmax_lse), PUT(dlse), PUT(dq), PUT(dk), PUT(dv), PUT(dsinks);
  PUT(delta), PUT(workspace), PUT(q_strides), PUT(k_strides), PUT(v_strides), PUT(out_strides), PUT(dout_strides);
  PUT(dq_strides), PUT(dk_strides), PUT(dv_strides), PUT(lse_batch_stride), PUT(lse_head_stride);
  PUT(dlse_batch_stride), PUT(dlse_head_stride), PUT(cu_seqlens_q), PUT(cu_seqlens_k), PUT(seqused_q), PUT(seqused_k);
  PUT(prefix_lens), PUT(sinks), PUT(batch), PUT(seqlen_q), PUT(seqlen_k), PUT(total_q), PUT(total_k);
  PUT(num_heads_q), PUT(num_heads_kv), PUT(head_dim), PUT(head_dim_v), put_rule(p.mask_rule), put_values(p.mask_values);
  PUT(sinks_are_fp32), PUT(deterministic), PUT(num_splits), PUT(max_blocks);
  PUT(workspace_bytes);
  put_float("softmax_scale", p.softmax_scale);
  put_float("softcap", p.softcap);
  return 0;
}

int broadhead_scheduler_metadata(const broadhead::SchedulerMetadataParams* params, void* stream, char*, std::size_t) {
  const broadhead::SchedulerMetadataParams& p = *params;
  wait_if_asked(p.seqlen_k);
  const Launch launch("scheduler_metadata");
  put("stream", stream);
  put("struct_size_fits", p.struct_size == sizeof(broadhead::SchedulerMetadataParams));
  PUT(metadata), PUT(seqused_k), PUT(cu_seqlens_k), PUT(leftpad_k), PUT(cu_seqlens_q), PUT(seqused_q);
  PUT(batch), PUT(seqlen_q), PUT(seqlen_k), PUT(seqlen_k_new), PUT(window_left), PUT(window_right);
  PUT(attention_chunk), PUT(rows_per_token), PUT(heads_in_grid), PUT(tile_m), PUT(tile_n), PUT(num_splits);
  PUT(target_ctas), PUT(metadata_tag);
  return 0;
}

int broadhead_combine(const broadhead::CombineParams* params, void* stream, char*, std::size_t) {
  const broadhead::CombineParams& p = *params;
  wait_if_asked(p.rows);
  const Launch launch("combine");
  put("stream", stream);
  put("struct_size_fits", p.struct_size == sizeof(broadhead::CombineParams));
  PUT(out_partial), PUT(lse_partial), PUT(out), PUT(softmax_lse), PUT(out_partial_split_stride);
  PUT(out_partial_row_stride), PUT(out_partial_head_stride), PUT(lse_partial_split_stride), PUT(lse_partial_row_stride);
  PUT(lse_partial_head_stride), PUT(out_row_stride), PUT(out_head_stride), PUT(lse_row_stride), PUT(lse_head_stride);
  PUT(rows), PUT(heads), PUT(head_dim_v), PUT(num_splits), PUT(out_dtype);
  return 0;
}

int broadhead_append_kv(const broadhead::AppendKvParams* params, void* stream, char* error, std::size_t error_size) {
  const broadhead::AppendKvParams& p = *params;
  wait_if_asked(p.block_size);
  const Launch launch("append_kv");
  if (p.seqlen_new == 99) {
    std::snprintf(error, error_size, "append_kv: launch: the stub was asked to fail");
    return 1;
  }
  put("stream", stream);
  put("struct_size_fits", p.struct_size == sizeof(broadhead::AppendKvParams));
  PUT(k_cache), PUT(v_cache), PUT(k_new), PUT(v_new), PUT(q), PUT(q_out), PUT(rotary_cos), PUT(rotary_sin);
  PUT(k_cache_strides), PUT(v_cache_strides), PUT(k_new_strides), PUT(v_new_strides), PUT(q_strides);
  PUT(q_out_strides), PUT(cos_stride), PUT(sin_stride), PUT(k_descale), PUT(v_descale), PUT(k_descale_strides);
  PUT(v_descale_strides), PUT(cache_seqlens), PUT(seqlens_out), PUT(rotary_seqlens), PUT(cu_seqlens_q);
  PUT(cu_seqlens_k_new), PUT(page_table), PUT(cache_batch_idx), PUT(page_table_batch_stride), PUT(num_blocks);
  PUT(num_owners), PUT(block_size), PUT(max_pages), PUT(batch), PUT(seqlen_q), PUT(seqlen_new), PUT(total_q);
  PUT(total_new), PUT(num_heads_q), PUT(num_heads_kv), PUT(head_dim), PUT(head_dim_v), PUT(rotary_dim);
  PUT(num_positions), PUT(rotary_interleaved), PUT(causal_or_local);
  put("angles_dtype", static_cast<long long>(p.angles_dtype));
  put("dtype", static_cast<long long>(p.dtype));
  put("cache_dtype", static_cast<long long>(p.cache_dtype));
  return 0;
}

int broadhead_merge_states(const broadhead::MergeStatesParams* params, void* stream, char*, std::size_t) {
  const broadhead::MergeStatesParams& p = *params;
  wait_if_asked(p.seqlen);
  const Launch launch("merge_states");
  put("stream", stream);
  put("struct_size_fits", p.struct_size == sizeof(broadhead::MergeStatesParams));
  PUT(out_a), PUT(out_b), PUT(out), PUT(lse_a), PUT(lse_b), PUT(softmax_lse), PUT(out_a_strides);
  PUT(out_b_strides), PUT(out_strides), PUT(lse_a_strides), PUT(lse_b_strides), PUT(lse_strides), PUT(batch);
  PUT(seqlen), PUT(heads), PUT(head_dim_v);
  put("dtype", static_cast<long long>(p.dtype));
  return 0;
}
