// _C.append_kv: packs one append of new keys and values, with its rotary embedding, into AppendKvParams.
#include "bindings/append.h"

#include <initializer_list>
#include <utility>

#include "bindings/functions.h"
#include "bindings/kernel_library.h"
#include "bindings/packing.h"

namespace broadhead {
namespace {

bool is_16_bit(ElementType type) { return type == ElementType::kBFloat16 || type == ElementType::kFloat16; }

// k_new or v_new: as its cache in heads and columns, dense or packed.
void check_new(const ArgumentChecker& reader, const char* name, const TensorView& tensor, const TensorView& cache) {
  reader.require((tensor.ndim() == 3 || tensor.ndim() == 4) && last_dim_contiguous(tensor), name,
                 "of 3 or 4 dimensions, the last contiguous", tensor);
  reader.require(tensor.size(-2) == cache.size(-2) && tensor.size(-1) == cache.size(-1), name,
                 "of the heads and head_dim of its cache", tensor);
  reader.require(tensor.device() == cache.device(), name, "on the device of k_cache", tensor);
}

// rotary_cos with rotary_sin, and q with q_out, which takes them too; each pair may be missing. Returns q's dimensions.
int pack_rotary(const ArgumentChecker& reader, const AppendTensors& tensors, AppendKvParams& params) {
  const TensorView &q = tensors.q, &q_out = tensors.q_out, &cos = tensors.rotary_cos, &sin = tensors.rotary_sin;
  const TensorView& k_new = tensors.k_new;
  for (const auto& [tensor, name] :
       {std::pair(&q, "q"), std::pair(&q_out, "q_out"), std::pair(&cos, "rotary_cos"), std::pair(&sin, "rotary_sin")}) {
    if (!tensor->present()) continue;
    reader.require(last_dim_contiguous(*tensor), name, "contiguous in its last dimension", *tensor);
    reader.require(tensor->device() == k_new.device(), name, "on the device of k_cache", *tensor);
  }
  reader.require(cos.present() == sin.present(), "rotary_sin", "given with rotary_cos", sin);
  reader.require(q_out.present() == q.present(), "q_out", "given with q", q_out);
  reader.require(cos.present() || !q.present(), "rotary_cos", "given with q", cos);
  if (!cos.present()) return 0;
  const bool any_angles = k_new.type() == ElementType::kFloat8E4M3 && is_16_bit(cos.type());
  reader.require(cos.ndim() == 2 && (cos.type() == ElementType::kFloat32 || cos.type() == k_new.type() || any_angles) &&
                     cos.type() != ElementType::kFloat8E4M3 && cos.size(0) >= 1 && 2 * cos.size(1) <= k_new.size(-1),
                 "rotary_cos",
                 "[positions, rotary_dim / 2], fp32 or of the dtype of k_new (of 8-bit ones bf16 or fp16), rotary_dim"
                 " at most head_dim",
                 cos);
  reader.require(same_shape(sin, cos) && sin.type() == cos.type(), "rotary_sin", "of the shape and dtype of rotary_cos",
                 sin);
  params.cos_stride = cos.size(0) == 1 ? 0 : cos.stride(0);
  params.sin_stride = sin.size(0) == 1 ? 0 : sin.stride(0);
  params.angles_dtype = data_type(cos.type());
  params.rotary_dim = static_cast<std::int32_t>(2 * cos.size(1));
  params.num_positions = static_cast<std::int32_t>(cos.size(0));
  if (!q.present()) return 0;
  reader.require((q.ndim() == 3 || q.ndim() == 4) && q.type() == k_new.type() && q.size(-1) == k_new.size(-1), "q",
                 "of 3 or 4 dimensions, with the dtype and head_dim of k_new", q);
  reader.require(same_shape(q_out, q) && q_out.type() == q.type(), "q_out", "of the shape and dtype of q", q_out);
  params.q_strides = used_strides(q);
  params.q_out_strides = used_strides(q_out);
  params.num_heads_q = static_cast<std::int32_t>(q.size(-2));
  params.seqlen_q = static_cast<std::int32_t>(q.ndim() == 4 ? q.size(1) : 0);
  params.total_q = static_cast<std::int32_t>(q.ndim() == 4 ? q.size(0) * q.size(1) : q.size(0));
  return q.ndim();
}

// An int32 vector that must be there.
void check_required(const ArgumentChecker& reader, const char* name, const TensorView& lengths, std::int64_t* batch) {
  if (!lengths.present()) reader.fail(name, "must be a tensor, got None");
  check_lengths(reader, name, lengths, batch);
}

}  // namespace

AppendKvParams pack_append(const ArgumentChecker& reader, const AppendTensors& tensors, const AppendFlags& flags) {
  const TensorView &k_cache = tensors.k_cache, &v_cache = tensors.v_cache;
  const TensorView &k_new = tensors.k_new, &v_new = tensors.v_new;
  const bool is_8_bit = k_cache.type() == ElementType::kFloat8E4M3;
  reader.require((is_16_bit(k_cache.type()) || is_8_bit) && last_dim_contiguous(k_cache), "k_cache",
                 "bf16, fp16 or float8_e4m3fn and contiguous in its last dimension", k_cache);
  bool same_places = last_dim_contiguous(v_cache) && v_cache.device() == k_cache.device();
  for (int dim = 0; dim < 3; ++dim) same_places = same_places && v_cache.size(dim) == k_cache.size(dim);
  reader.require(same_places, "v_cache", "as k_cache but for the last dimension, which is contiguous", v_cache);
  reader.require(k_new.type() == k_cache.type() || (is_8_bit && is_16_bit(k_new.type())), "k_new",
                 "of the dtype of k_cache, or bf16 or fp16 where that is float8_e4m3fn", k_new);
  check_new(reader, "k_new", k_new, k_cache);
  check_new(reader, "v_new", v_new, v_cache);
  bool same_tokens = true;
  for (int dim = 0; dim < k_new.ndim() - 2; ++dim) same_tokens = same_tokens && v_new.size(dim) == k_new.size(dim);
  reader.require(same_tokens, "v_new", "of the tokens of k_new", v_new);

  AppendKvParams params = make_params<AppendKvParams>();
  params.k_cache_strides = used_strides(k_cache);
  params.v_cache_strides = used_strides(v_cache);
  params.k_new_strides = used_strides(k_new);
  params.v_new_strides = used_strides(v_new);
  params.dtype = data_type(k_new.type());
  params.cache_dtype = data_type(k_cache.type());
  params.num_blocks = k_cache.size(0);
  params.num_owners = k_cache.size(0);
  params.block_size = static_cast<std::int32_t>(k_cache.size(1));
  params.num_heads_kv = static_cast<std::int32_t>(k_cache.size(2));
  params.head_dim = static_cast<std::int32_t>(k_cache.size(3));
  params.head_dim_v = static_cast<std::int32_t>(v_cache.size(3));
  params.seqlen_new = static_cast<std::int32_t>(k_new.ndim() == 4 ? k_new.size(1) : 0);
  params.total_new = static_cast<std::int32_t>(k_new.ndim() == 4 ? k_new.size(0) * k_new.size(1) : k_new.size(0));

  std::int64_t batch = k_new.ndim() == 4 ? k_new.size(0) : -1;
  check_required(reader, "cache_seqlens", tensors.cache_seqlens, &batch);
  check_required(reader, "seqlens_out", tensors.seqlens_out, &batch);
  params.batch = static_cast<std::int32_t>(batch);
  const int q_dims = pack_rotary(reader, tensors, params);
  check_lengths(reader, "rotary_seqlens", tensors.rotary_seqlens, &batch);
  check_lengths(reader, "cu_seqlens_q", tensors.cu_seqlens_q, &batch, 1);
  if (tensors.cu_seqlens_q.present() != (q_dims == 3)) {
    reader.fail("cu_seqlens_q", "must be given exactly when q has 3 dimensions");
  }
  if (q_dims == 4 && params.total_q != batch * params.seqlen_q) {
    reader.fail("q", "must have as many sequences as k_new, " + std::to_string(batch));
  }
  check_lengths(reader, "cu_seqlens_k_new", tensors.cu_seqlens_k_new, &batch, 1);
  if (tensors.cu_seqlens_k_new.present() != (k_new.ndim() == 3)) {
    reader.fail("cu_seqlens_k_new", "must be given exactly when k_new has 3 dimensions, got k_new " + k_new.describe());
  }
  const TensorView& page_table = tensors.page_table;
  if (page_table.present()) {
    reader.require(last_dim_contiguous(page_table), "page_table", "contiguous in its last dimension", page_table);
    reader.require(params.block_size >= 1, "k_cache", "of page_size >= 1", k_cache);
    params.page_table_batch_stride = page_table.stride(0);
    params.num_owners = page_table.size(0);
    params.max_pages = static_cast<std::int32_t>(page_table.size(1));
  }
  check_lengths(reader, "cache_batch_idx", tensors.cache_batch_idx, &batch);
  params.k_descale_strides = check_descale(reader, "k_descale", tensors.k_descale, batch, params.num_heads_kv);
  params.v_descale_strides = check_descale(reader, "v_descale", tensors.v_descale, batch, params.num_heads_kv);
  params.rotary_interleaved = flags.rotary_interleaved;
  params.causal_or_local = flags.causal_or_local;
  return params;
}

void set_append_addresses(const AppendTensors& tensors, AppendKvParams& params) {
  params.k_cache = tensors.k_cache.data();
  params.v_cache = tensors.v_cache.data();
  params.k_new = tensors.k_new.data();
  params.v_new = tensors.v_new.data();
  params.q = tensors.q.data();
  params.q_out = tensors.q_out.data();
  params.rotary_cos = tensors.rotary_cos.data();
  params.rotary_sin = tensors.rotary_sin.data();
  params.k_descale = tensors.k_descale.as<const float>();
  params.v_descale = tensors.v_descale.as<const float>();
  params.cache_seqlens = tensors.cache_seqlens.as<const std::int32_t>();
  params.seqlens_out = tensors.seqlens_out.as<std::int32_t>();
  params.rotary_seqlens = tensors.rotary_seqlens.as<const std::int32_t>();
  params.cu_seqlens_q = tensors.cu_seqlens_q.as<const std::int32_t>();
  params.cu_seqlens_k_new = tensors.cu_seqlens_k_new.as<const std::int32_t>();
  params.page_table = tensors.page_table.as<const std::int32_t>();
  params.cache_batch_idx = tensors.cache_batch_idx.as<const std::int32_t>();
}

void append_kv(ArgumentReader& reader) {
  const pybind11::handle like = reader.peek();
  const TensorView k_cache = reader.tensor("k_cache", ElementType::kOther, 4);
  const TensorView v_cache = reader.tensor("v_cache", k_cache.type(), 4);
  const TensorView k_new = reader.tensor("k_new");
  const TensorView v_new = reader.tensor("v_new", k_new.type(), k_new.ndim());
  const auto lengths = [&](const char* name) { return reader.optional_tensor(name, ElementType::kInt32, 1); };
  const TensorView cache_seqlens = lengths("cache_seqlens");
  const TensorView seqlens_out = lengths("seqlens_out");
  const TensorView q = reader.optional_tensor("q");
  const TensorView q_out = reader.optional_tensor("q_out");
  const TensorView rotary_cos = reader.optional_tensor("rotary_cos");
  const TensorView rotary_sin = reader.optional_tensor("rotary_sin");
  const TensorView rotary_seqlens = lengths("rotary_seqlens");
  const TensorView cu_seqlens_q = lengths("cu_seqlens_q");
  const TensorView cu_seqlens_k_new = lengths("cu_seqlens_k_new");
  const TensorView page_table = reader.optional_tensor("page_table", ElementType::kInt32, 2);
  const TensorView cache_batch_idx = lengths("cache_batch_idx");
  const TensorView k_descale = reader.optional_tensor("k_descale", ElementType::kFloat32, 2);
  const TensorView v_descale = reader.optional_tensor("v_descale", ElementType::kFloat32, 2);
  const AppendTensors tensors{
      k_cache,         v_cache,    k_new,      v_new,          cache_seqlens, seqlens_out,      q,
      q_out,           rotary_cos, rotary_sin, rotary_seqlens, cu_seqlens_q,  cu_seqlens_k_new, page_table,
      cache_batch_idx, k_descale,  v_descale};
  const bool interleaved = reader.truth(), causal_or_local = reader.truth();
  AppendKvParams params = pack_append(reader, tensors, {interleaved, causal_or_local});
  set_append_addresses(tensors, params);

  void* stream = reader.stream(like, k_cache.device());
  const KernelLibrary& library = common_library();
  run_without_gil(false, [&](char* error) { return library.append_kv(&params, stream, error, kErrorSize); });
}

}  // namespace broadhead
