// Packs the tensors of a forward call into AttnParams, all but their addresses.
#include <algorithm>
#include <utility>

#include "bindings/attention_call.h"
#include "bindings/call_checker.h"
#include "bindings/packing.h"

namespace broadhead {
namespace {

// k and v: packed, paged or dense.
void pack_key_layout(const CallChecker& call, const TensorView& k, const TensorView& v, AttnParams& params) {
  const TensorView& page_table = call.tensor(kPageTable, ElementType::kInt32, 2);
  if (page_table.present()) {
    call.require(last_dim_contiguous(page_table), "page_table", "contiguous in its last dimension", page_table);
    call.require(k.ndim() == 4 && v.ndim() == 4, "k and v", "[pages, page_size, heads, head_dim] with a page table", k);
    params.page_table_batch_stride = page_table.stride(0);
    params.page_size = static_cast<std::int32_t>(k.size(1));
    params.num_pages = std::min<std::int64_t>(k.size(0), 1ll << 31);
    params.num_kv_batches = page_table.size(0);
    return;
  }
  call.keys(k);
  (call.has(kCuSeqlensK) ? params.total_k : params.num_kv_batches) = k.size(0);
}

void pack_qv(const CallChecker& call, const Kernel& kernel, const TensorView& q, const TensorView& v,
             AttnParams& params) {
  const TensorView& qv = call.tensor(kQv, kernel.dtype, q.ndim());
  if (!qv.present()) return;
  bool fits = last_dim_contiguous(qv) && qv.device() == q.device() && qv.size(-1) == v.size(-1);
  for (int dim = 0; dim < q.ndim() - 1; ++dim) fits = fits && qv.size(dim) == q.size(dim);
  call.require(fits, "qv", "of the shape of q with head_dim_v, on its device, the last dimension contiguous", qv);
  params.qv_strides = strides_of(qv);
}

DescaleStrides pack_descale(const CallChecker& call, Argument argument, const AttnParams& params) {
  const TensorView& descale = call.tensor(argument, ElementType::kFloat32, 2);
  return check_descale(call, name_of(argument), descale, params.batch, params.num_heads_kv);
}

// Keys that all sequences share: behind everything else, which the checks read.
void pack_shared(const AttentionCall& call, const CallChecker& checker, const Kernel& kernel, const TensorView& q,
                 AttnParams& params) {
  if (!call.is_shared()) return;
  constexpr char kName[] = "shared_page_table";
  const TensorView& page_table = call.shared_page_table;
  page_table.check("forward", kName, ElementType::kInt32, 1);
  if (!kernel.is_decode()) checker.fail(kName, "is for decode kernels: others do not read it");
  checker.require(contiguous(page_table) && page_table.device() == q.device(), kName, "contiguous, on the device of q",
                  page_table);
  const long long length = PyLong_AsLongLong(call.shared_length);
  if (length == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  if (length < 1 || length > INT32_MAX || length > page_table.size(0) * params.page_size) {
    checker.fail("shared_length", "must be in [1, pages * page_size], with a page table, got " +
                                      std::to_string(length) + " with " + page_table.describe());
  }
  // Token t of the call lies at t times one stride.
  const bool one_piece = q.ndim() == 3 || q.size(0) == 1 || q.size(1) == 1 || q.stride(0) == q.size(1) * q.stride(1);
  checker.require(one_piece, "q", "one piece of tokens with shared_page_table", q);
  for (const Argument argument : {kSequsedQ, kPrefixLens, kQueryRanges, kCausalBySequence, kTreeMask}) {
    if (checker.has(argument)) checker.fail(name_of(argument), "must be None with shared_page_table");
  }
  const MaskRule& rule = params.mask_rule;
  if (rule.window_left >= 0 || rule.window_right > 0 || rule.attention_chunk > 0) {
    checker.fail(kName, "is for calls with no window and no attention_chunk");
  }
  if (params.num_splits == 1 || params.cell_blocks > 0) {
    checker.fail(kName, "is for calls that are split evenly, got num_splits " + std::to_string(params.num_splits) +
                            ", cell_blocks " + std::to_string(params.cell_blocks));
  }
  params.shared_seqlen_k = static_cast<std::int32_t>(length);
}

}  // namespace

void pack_forward(const AttentionCall& given, const Kernel& kernel, AttnParams& params) {
  const CallChecker call("forward", given);
  const TensorView& q = call.required(kQ, kernel.dtype);
  const TensorView& k = call.required(kK, kernel.kv_dtype);
  const TensorView& v = call.required(kV, kernel.kv_dtype);
  const TensorView& out = call.required(kOut, kernel.out_dtype, q.ndim());
  for (const auto& [tensor, name] :
       {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v"), std::pair(&out, "out")}) {
    call.rows(*tensor, name, q);
  }
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);

  std::int64_t batch = call.queries(q);
  call.lengths(kCuSeqlensK, &batch, 1);
  call.lengths(kSequsedQ, &batch);
  call.lengths(kSequsedK, &batch);
  call.lengths(kLeftpadK, &batch);
  call.lengths(kKvBatchIdx, &batch);
  pack_key_layout(call, k, v, params);
  call.lengths(kPrefixLens, &batch);
  params.sinks_are_fp32 = call.sinks_are_fp32(kernel.out_dtype, q);
  const TensorView& metadata = call.tensor(kSchedulerMetadata, ElementType::kInt32, 1);
  call.require(!metadata.present() || (contiguous(metadata) && metadata.size(0) >= metadata_size(batch)),
               "scheduler_metadata", "contiguous, 1 + 4 * round_up(batch, 4) entries", metadata);

  params.mask_values = call.mask_values(q, batch);
  call.sizes(q, k, v, batch, params);
  pack_qv(call, kernel, q, v, params);
  params.q_descale_strides = pack_descale(call, kQDescale, params);
  params.k_descale_strides = pack_descale(call, kKDescale, params);
  params.v_descale_strides = pack_descale(call, kVDescale, params);
  params.q_dtype = data_type(kernel.dtype);
  pack_shared(given, call, kernel, q, params);

  AttnParams asked = params;
  set_addresses(given, asked);
  params.workspace_bytes = kernel.library->forward_workspace(kernel.index, &asked);
  if (params.workspace_bytes < 0) {
    throw BindingError(std::string("_C.forward: ") + kernel.info->id + " does not tell its workspace on device " +
                       std::to_string(q.device()));
  }
}

}  // namespace broadhead
