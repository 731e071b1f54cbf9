// _C.run_backward: packs a backward call into AttnBwdParams (the only packing), allocates its scratch and launches it.
#include "bindings/backward.h"

#include <algorithm>
#include <utility>

#include "bindings/attention_call.h"
#include "bindings/call_checker.h"
#include "bindings/functions.h"
#include "bindings/packing.h"
#include "bindings/resources.h"

namespace py = pybind11;

namespace broadhead {
namespace {

constexpr char kFunction[] = "run_backward";
// D lies behind the workspace, at a multiple of so many bytes; allocators of torch align what they give to more.
constexpr std::int64_t kScratchAlignment = 256;

struct Strides {
  std::int64_t batch;
  std::int64_t head;
};

// fp32 [B, Hq, Sq] or [Hq, T], as q has rows and heads.
Strides check_rows_first(const CallChecker& call, const TensorView& lse, const char* name, const TensorView& q) {
  const bool fits = lse.size(-2) == q.size(-2) && lse.size(-1) == q.size(-3) &&
                    (lse.ndim() == 2 || lse.size(0) == q.size(0)) && (lse.size(-1) <= 1 || lse.stride(-1) == 1) &&
                    lse.device() == q.device();
  call.require(fits, name, "[batch, heads, seqlen] or [heads, total] as q has them, the last dimension contiguous",
               lse);
  return {lse.ndim() == 3 ? lse.stride(0) : 0, lse.stride(-2)};
}

// dout, dq, dk or dv: of the shape and dtype of another tensor.
TensorStrides check_like(const CallChecker& call, const TensorView& tensor, const char* name, const TensorView& like,
                         const char* of) {
  call.rows(tensor, name, like);
  call.require(same_shape(tensor, like) && tensor.type() == like.type(), name, of, tensor);
  return strides_of(tensor);
}

void check_absent(const CallChecker& call) {
  for (const Argument argument :
       {kQv, kLeftpadK, kKvBatchIdx, kPageTable, kQDescale, kKDescale, kVDescale, kSchedulerMetadata, kTreeMask}) {
    if (call.has(argument)) call.fail(name_of(argument), "must be None: backward kernels do not read it");
  }
}

void pack_vectors(const AttentionCall& given, const CallChecker& call, const TensorView& q, const TensorView& k,
                  AttnBwdParams& params) {
  std::int64_t batch = call.queries(q);
  call.lengths(kCuSeqlensK, &batch, 1);
  call.lengths(kSequsedQ, &batch);
  call.lengths(kSequsedK, &batch);
  call.lengths(kPrefixLens, &batch);
  call.keys(k);
  params.total_k = k.ndim() == 4 ? k.size(0) * k.size(1) : k.size(0);
  // Packed: no sequence is longer than all rows, whatever bound the caller gave. The grids go by it.
  if (k.ndim() == 3 && params.total_k < params.seqlen_k) params.seqlen_k = static_cast<std::int32_t>(params.total_k);
  params.batch = static_cast<std::int32_t>(batch);
  params.cu_seqlens_q = call.tensor(kCuSeqlensQ).as<const std::int32_t>();
  params.cu_seqlens_k = call.tensor(kCuSeqlensK).as<const std::int32_t>();
  params.seqused_q = call.tensor(kSequsedQ).as<const std::int32_t>();
  params.seqused_k = call.tensor(kSequsedK).as<const std::int32_t>();
  params.prefix_lens = call.tensor(kPrefixLens).as<const std::int32_t>();
  params.mask_values = call.mask_values(q, batch);
  set_mask_addresses(given, params.mask_values);
}

void pack_inputs(const AttentionCall& given, const CallChecker& call, ElementType dtype, AttnBwdParams& params) {
  const TensorView& q = call.required(kQ, dtype);
  const TensorView& k = call.required(kK, dtype);
  const TensorView& v = call.required(kV, dtype, k.ndim());
  const TensorView& out = call.required(kOut, dtype, q.ndim());
  for (const auto& [tensor, name] :
       {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v"), std::pair(&out, "out")}) {
    call.rows(*tensor, name, q);
  }
  check_absent(call);
  pack_vectors(given, call, q, k, params);
  call.sizes(q, k, v, params.batch, params);
  params.sinks_are_fp32 = call.sinks_are_fp32(dtype, q);
  params.sinks = call.tensor(kSinks).data();
  params.q = q.data();
  params.k = k.data();
  params.v = v.data();
  params.out = out.data();
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);
}

void pack_gradients(const CallChecker& call, ArgumentReader& reader, AttnBwdParams& params) {
  const TensorView &q = call.tensor(kQ), &k = call.tensor(kK), &v = call.tensor(kV), &out = call.tensor(kOut);
  const TensorView dout = reader.tensor("dout");
  const TensorView lse = reader.tensor("softmax_lse", ElementType::kFloat32, q.ndim() - 1);
  const TensorView dlse = reader.optional_tensor("dlse", ElementType::kFloat32, q.ndim() - 1);
  const TensorView dq = reader.tensor("dq");
  const TensorView dk = reader.tensor("dk");
  const TensorView dv = reader.tensor("dv");
  const TensorView dsinks = reader.optional_tensor("dsinks", ElementType::kFloat32, 1);
  params.dout_strides = check_like(call, dout, "dout", out, "of the shape and dtype of out");
  params.dq_strides = check_like(call, dq, "dq", q, "of the shape and dtype of q");
  params.dk_strides = check_like(call, dk, "dk", k, "of the shape and dtype of k");
  params.dv_strides = check_like(call, dv, "dv", v, "of the shape and dtype of v");
  const Strides of_lse = check_rows_first(call, lse, "softmax_lse", q);
  params.lse_batch_stride = of_lse.batch;
  params.lse_head_stride = of_lse.head;
  if (dlse.present()) {
    const Strides of_dlse = check_rows_first(call, dlse, "dlse", q);
    params.dlse_batch_stride = of_dlse.batch;
    params.dlse_head_stride = of_dlse.head;
  }
  call.require(dsinks.present() == call.has(kSinks), "dsinks", "given exactly with sinks", dsinks);
  call.require(!dsinks.present() || (contiguous(dsinks) && dsinks.size(0) == q.size(-2)), "dsinks",
               "contiguous, an entry for each head of q", dsinks);
  params.dout = dout.data();
  params.softmax_lse = lse.as<const float>();
  params.dlse = dlse.as<const float>();
  params.dq = dq.data();
  params.dk = dk.data();
  params.dv = dv.data();
  params.dsinks = dsinks.as<float>();
}

// Sets what the kernel asks for, and returns the fp32 elements of workspace and D together.
std::int64_t plan_scratch(const Kernel& kernel, AttnBwdParams& params) {
  params.workspace_bytes = kernel.library->backward_workspace(kernel.index, &params);
  if (params.workspace_bytes < 0) {
    throw BindingError(std::string("_C.") + kFunction + ": " + kernel.info->id + " does not tell its workspace");
  }
  const std::int64_t aligned = (params.workspace_bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
  return aligned / static_cast<std::int64_t>(sizeof(float)) + params.num_heads_q * params.total_q;
}

}  // namespace

void run_backward(ArgumentReader& reader) {
  const auto& launch = py::cast<const BackwardLaunch&>(reader.object());
  AttentionCall call(reader.object());
  call.read(Read::kFirst);
  const CallChecker checker(kFunction, call);
  const DeviceGuard guard(launch.device);
  AttnBwdParams params = launch.params;
  pack_inputs(call, checker, launch.kernel.dtype, params);
  pack_gradients(checker, reader, params);
  const TensorView& q = call.tensors[kQ];
  const std::int64_t size = plan_scratch(launch.kernel, params);
  const Scratch scratch(call.arguments[kQ], q.device(), size);
  params.workspace = params.workspace_bytes > 0 ? scratch.data() : nullptr;
  params.delta = scratch.data() + (size - params.num_heads_q * params.total_q);
  void* stream = current_stream(call.arguments[kQ], q.device());
  // First launches prepare the kernel for its device one after the other; no list is kept of those that ran.
  run_without_gil(true, [&](char* error) {
    return launch.kernel.library->backward(launch.kernel.index, &params, stream, error, kErrorSize);
  });
}

}  // namespace broadhead
