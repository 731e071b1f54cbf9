// Packs the tensors of a forward call into AttnParams, all but their addresses.
//
// The Python side has validated the call; what is checked here keeps a mistake there from reading foreign memory.
#include <algorithm>
#include <utility>

#include "bindings/argument_reader.h"
#include "bindings/forward_call.h"
#include "bindings/packing.h"

namespace broadhead {
namespace {

const ArgumentChecker checker("forward");

const TensorView& checked(const ForwardCall& call, Argument argument, ElementType type = ElementType::kOther,
                          int ndim = 0) {
  call.tensors[argument].check("forward", name_of(argument), type, ndim);
  return call.tensors[argument];
}

const TensorView& required(const ForwardCall& call, Argument argument, ElementType type, int ndim = 0) {
  if (!call.tensors[argument].present()) checker.fail(name_of(argument), "must be a tensor, got None");
  return checked(call, argument, type, ndim);
}

void check_vector(const ForwardCall& call, Argument argument, std::int64_t* batch, int extra = 0) {
  check_lengths(checker, name_of(argument), checked(call, argument, ElementType::kInt32, 1), batch, extra);
}

// k and v: packed, paged or dense.
void pack_key_layout(const ForwardCall& call, const TensorView& k, const TensorView& v, AttnParams& params) {
  const bool packed = call.tensors[kCuSeqlensK].present();
  const TensorView& page_table = checked(call, kPageTable, ElementType::kInt32, 2);
  if (page_table.present()) {
    checker.require(last_dim_contiguous(page_table), "page_table", "contiguous in its last dimension", page_table);
    checker.require(k.ndim() == 4 && v.ndim() == 4, "k and v", "[pages, page_size, heads, head_dim] with a page table",
                    k);
    params.page_table_batch_stride = page_table.stride(0);
    params.page_size = static_cast<std::int32_t>(k.size(1));
    params.num_pages = std::min<std::int64_t>(k.size(0), 1ll << 31);
    params.num_kv_batches = page_table.size(0);
    return;
  }
  checker.require(
      k.ndim() == (packed ? 3 : 4), "k",
      packed ? "[tokens, heads, head_dim] with cu_seqlens_k" : "[batch, tokens, heads, head_dim] without cu_seqlens_k",
      k);
  (packed ? params.total_k : params.num_kv_batches) = k.size(0);
}

void pack_sinks(const ForwardCall& call, const Kernel& kernel, const TensorView& q, AttnParams& params) {
  const TensorView& sinks = checked(call, kSinks, ElementType::kOther, 1);
  if (!sinks.present()) return;
  params.sinks_are_fp32 = sinks.type() == ElementType::kFloat32;
  checker.require(
      (params.sinks_are_fp32 || sinks.type() == kernel.out_dtype) && contiguous(sinks) && sinks.size(0) == q.size(-2),
      "sinks", "one logit for each head of q, fp32 or the dtype of out", sinks);
}

void pack_qv(const ForwardCall& call, const Kernel& kernel, const TensorView& q, const TensorView& v,
             AttnParams& params) {
  const TensorView& qv = checked(call, kQv, kernel.dtype, q.ndim());
  if (!qv.present()) return;
  bool fits = last_dim_contiguous(qv) && qv.device() == q.device() && qv.size(-1) == v.size(-1);
  for (int dim = 0; dim < q.ndim() - 1; ++dim) fits = fits && qv.size(dim) == q.size(dim);
  checker.require(fits, "qv", "of the shape of q with head_dim_v, on its device, the last dimension contiguous", qv);
  params.qv_strides = strides_of(qv);
}

DescaleStrides pack_descale(const ForwardCall& call, Argument argument, const AttnParams& params) {
  const TensorView& descale = checked(call, argument, ElementType::kFloat32, 2);
  return check_descale(checker, name_of(argument), descale, params.batch, params.num_heads_kv);
}

// Keys that all sequences share: behind everything else, which the checks read.
void pack_shared(const ForwardCall& call, const Kernel& kernel, const TensorView& q, AttnParams& params) {
  if (!call.is_shared()) return;
  constexpr char kName[] = "shared_page_table";
  const TensorView& page_table = call.shared_page_table;
  page_table.check("forward", kName, ElementType::kInt32, 1);
  if (!kernel.is_decode) checker.fail(kName, "is for decode kernels: others do not read it");
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
  for (const Argument argument : {kSequsedQ, kPrefixLens}) {
    if (call.tensors[argument].present()) checker.fail(name_of(argument), "must be None with shared_page_table");
  }
  if (params.window_left >= 0 || params.window_right > 0 || params.attention_chunk > 0) {
    checker.fail(kName, "is for calls with no window and no attention_chunk");
  }
  if (params.num_splits == 1 || params.cell_blocks > 0) {
    checker.fail(kName, "is for calls that are split evenly, got num_splits " + std::to_string(params.num_splits) +
                            ", cell_blocks " + std::to_string(params.cell_blocks));
  }
  params.shared_seqlen_k = static_cast<std::int32_t>(length);
}

}  // namespace

void pack_forward(const ForwardCall& call, const Kernel& kernel, std::int64_t scratch_size, AttnParams& params) {
  const TensorView& q = required(call, kQ, kernel.dtype);
  const TensorView& k = required(call, kK, kernel.kv_dtype);
  const TensorView& v = required(call, kV, kernel.kv_dtype);
  const TensorView& out = required(call, kOut, kernel.out_dtype, q.ndim());
  for (const auto& [tensor, name] :
       {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v"), std::pair(&out, "out")}) {
    checker.require((tensor->ndim() == 3 || tensor->ndim() == 4) && last_dim_contiguous(*tensor), name,
                    "of 3 or 4 dimensions, the last contiguous", *tensor);
    checker.require(tensor->device() == q.device(), name, "on the device of q", *tensor);
  }
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);

  std::int64_t batch = q.ndim() == 4 ? q.size(0) : -1;
  check_vector(call, kCuSeqlensQ, &batch, 1);
  if (call.tensors[kCuSeqlensQ].present() != (q.ndim() == 3)) {
    checker.fail("cu_seqlens_q", "must be given exactly when q has 3 dimensions, got q " + q.describe());
  }
  check_vector(call, kCuSeqlensK, &batch, 1);
  check_vector(call, kSequsedQ, &batch);
  check_vector(call, kSequsedK, &batch);
  check_vector(call, kLeftpadK, &batch);
  check_vector(call, kKvBatchIdx, &batch);
  pack_key_layout(call, k, v, params);
  check_vector(call, kPrefixLens, &batch);
  pack_sinks(call, kernel, q, params);
  const TensorView& metadata = checked(call, kSchedulerMetadata, ElementType::kInt32, 1);
  checker.require(!metadata.present() || (contiguous(metadata) && metadata.size(0) >= metadata_size(batch)),
                  "scheduler_metadata", "contiguous, 1 + 4 * round_up(batch, 4) entries", metadata);

  params.batch = static_cast<std::int32_t>(batch);
  params.num_heads_q = static_cast<std::int32_t>(q.size(-2));
  params.num_heads_kv = static_cast<std::int32_t>(k.size(-2));
  checker.require(params.num_heads_kv > 0 && params.num_heads_q % params.num_heads_kv == 0, "k",
                  "of a head count that divides that of q", k);
  params.head_dim = static_cast<std::int32_t>(q.size(-1));
  params.head_dim_v = static_cast<std::int32_t>(v.size(-1));
  pack_qv(call, kernel, q, v, params);
  params.q_descale_strides = pack_descale(call, kQDescale, params);
  params.k_descale_strides = pack_descale(call, kKDescale, params);
  params.v_descale_strides = pack_descale(call, kVDescale, params);

  params.total_q = q.ndim() == 4 ? q.size(0) * q.size(1) : q.size(0);
  // Packed: no sequence is longer than all rows, whatever bound the caller gave.
  if (q.ndim() == 3 && params.total_q < params.seqlen_q) params.seqlen_q = static_cast<std::int32_t>(params.total_q);
  params.q_dtype = kernel.dtype == ElementType::kFloat8E4M3 ? DataType::kFloat8E4M3
                   : kernel.dtype == ElementType::kFloat16  ? DataType::kFloat16
                                                            : DataType::kBFloat16;
  params.workspace_bytes = scratch_size * static_cast<std::int64_t>(sizeof(float));
  if (scratch_size < partials_size(params, kernel)) {
    checker.fail("scratch_size", "must hold [num_splits, heads, rows, head_dim_v + 1] = " +
                                     std::to_string(partials_size(params, kernel)) + " when num_splits > 1, got " +
                                     std::to_string(scratch_size));
  }
  pack_shared(call, kernel, q, params);
}

}  // namespace broadhead
