// _C.merge_states: packs two attention results of the same queries into MergeStatesParams.
#include <initializer_list>
#include <utility>

#include "bindings/functions.h"
#include "bindings/kernel_library.h"
#include "bindings/packing.h"

namespace broadhead {
namespace {

// [B, H, S] or [H, T].
TensorStrides lse_strides(const TensorView& lse) {
  return {lse.ndim() == 3 ? lse.stride(0) : 0, lse.stride(-1), lse.stride(-2)};
}

}  // namespace

void merge_states(ArgumentReader& reader) {
  const pybind11::handle like = reader.peek();
  const TensorView out_a = reader.tensor("out_a");
  const int dims = out_a.ndim();
  const TensorView lse_a = reader.tensor("lse_a", ElementType::kFloat32, dims - 1);
  const TensorView out_b = reader.tensor("out_b", out_a.type(), dims);
  const TensorView lse_b = reader.tensor("lse_b", ElementType::kFloat32, dims - 1);
  const TensorView out = reader.tensor("out", out_a.type(), dims);
  const TensorView lse = reader.tensor("softmax_lse", ElementType::kFloat32, dims - 1);
  reader.require(
      (dims == 3 || dims == 4) && (out_a.type() == ElementType::kFloat32 || out_a.type() == ElementType::kBFloat16 ||
                                   out_a.type() == ElementType::kFloat16),
      "out_a", "fp32, bf16 or fp16 of 3 or 4 dimensions", out_a);
  for (const auto& [tensor, name] : {std::pair(&out_a, "out_a"), std::pair(&out_b, "out_b"), std::pair(&out, "out")}) {
    reader.require(same_shape(*tensor, out_a) && last_dim_contiguous(*tensor), name,
                   "of the shape of out_a and contiguous in its last dimension", *tensor);
    reader.require(tensor->device() == out_a.device(), name, "on the device of out_a", *tensor);
  }
  for (const auto& [tensor, name] :
       {std::pair(&lse_a, "lse_a"), std::pair(&lse_b, "lse_b"), std::pair(&lse, "softmax_lse")}) {
    reader.require(tensor->size(-1) == out_a.size(-3) && tensor->size(-2) == out_a.size(-2) &&
                       (dims == 3 || tensor->size(0) == out_a.size(0)),
                   name, "[batch, heads, seqlen] or [heads, total] as out_a has them", *tensor);
    reader.require(tensor->device() == out_a.device(), name, "on the device of out_a", *tensor);
  }

  MergeStatesParams params = make_params<MergeStatesParams>();
  params.out_a = out_a.data();
  params.out_b = out_b.data();
  params.out = out.data();
  params.lse_a = lse_a.as<const float>();
  params.lse_b = lse_b.as<const float>();
  params.softmax_lse = lse.as<float>();
  params.out_a_strides = used_strides(out_a);
  params.out_b_strides = used_strides(out_b);
  params.out_strides = used_strides(out);
  params.lse_a_strides = lse_strides(lse_a);
  params.lse_b_strides = lse_strides(lse_b);
  params.lse_strides = lse_strides(lse);
  params.batch = static_cast<std::int32_t>(dims == 4 ? out_a.size(0) : 1);
  params.seqlen = static_cast<std::int32_t>(out_a.size(-3));
  params.heads = static_cast<std::int32_t>(out_a.size(-2));
  params.head_dim_v = static_cast<std::int32_t>(out_a.size(-1));
  params.dtype = data_type(out_a.type());

  void* stream = reader.stream(like, out_a.device());
  const KernelLibrary& library = common_library();
  run_without_gil(false, [&](char* error) { return library.merge_states(&params, stream, error, kErrorSize); });
}

}  // namespace broadhead
