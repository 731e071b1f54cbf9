// Merges two attention results of the same queries: packs them into MergeStatesParams, once a kind of call.
#include <initializer_list>
#include <iterator>
#include <memory>
#include <utility>

#include "bindings/attention_call.h"
#include "bindings/call_table.h"
#include "bindings/functions.h"
#include "bindings/kernel_library.h"
#include "bindings/packing.h"
#include "bindings/resources.h"

namespace py = pybind11;

namespace broadhead {
namespace {

constexpr char kFunction[] = "merge_states";
const ArgumentChecker checker(kFunction);

// [B, H, S] or [H, T].
TensorStrides lse_strides(const TensorView& lse) {
  return {lse.ndim() == 3 ? lse.stride(0) : 0, lse.stride(-1), lse.stride(-2)};
}

struct MergeTensors {
  TensorView out_a, lse_a, out_b, lse_b, out, lse;
};

// What all merges of a kind have in common.
struct MergeLaunch {
  py::int_ device;
  Allocation out;  // for calls that pass none; given out_a where it has no arguments of its own
  Allocation lse;
  MergeStatesParams params;  // without addresses
};

MergeStatesParams pack(const MergeTensors& tensors) {
  const TensorView &out_a = tensors.out_a, &out_b = tensors.out_b, &out = tensors.out;
  const TensorView &lse_a = tensors.lse_a, &lse_b = tensors.lse_b, &lse = tensors.lse;
  out_a.check(kFunction, "out_a", ElementType::kOther, 0);
  const int dims = out_a.ndim();
  for (const auto& [tensor, name] : {std::pair(&out_b, "out_b"), std::pair(&out, "out")}) {
    tensor->check(kFunction, name, out_a.type(), dims);
  }
  for (const auto& [tensor, name] :
       {std::pair(&lse_a, "lse_a"), std::pair(&lse_b, "lse_b"), std::pair(&lse, "softmax_lse")}) {
    tensor->check(kFunction, name, ElementType::kFloat32, dims - 1);
  }
  checker.require(
      (dims == 3 || dims == 4) && (out_a.type() == ElementType::kFloat32 || out_a.type() == ElementType::kBFloat16 ||
                                   out_a.type() == ElementType::kFloat16),
      "out_a", "fp32, bf16 or fp16 of 3 or 4 dimensions", out_a);
  for (const auto& [tensor, name] : {std::pair(&out_a, "out_a"), std::pair(&out_b, "out_b"), std::pair(&out, "out")}) {
    checker.require(same_shape(*tensor, out_a) && last_dim_contiguous(*tensor), name,
                    "of the shape of out_a and contiguous in its last dimension", *tensor);
    checker.require(tensor->device() == out_a.device(), name, "on the device of out_a", *tensor);
  }
  for (const auto& [tensor, name] :
       {std::pair(&lse_a, "lse_a"), std::pair(&lse_b, "lse_b"), std::pair(&lse, "softmax_lse")}) {
    checker.require(tensor->size(-1) == out_a.size(-3) && tensor->size(-2) == out_a.size(-2) &&
                        (dims == 3 || tensor->size(0) == out_a.size(0)),
                    name, "[batch, heads, seqlen] or [heads, total] as out_a has them", *tensor);
    checker.require(tensor->device() == out_a.device(), name, "on the device of out_a", *tensor);
  }

  MergeStatesParams params = make_params<MergeStatesParams>();
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

  return params;
}

void read(const char* name, py::handle tensor, TensorView& view) {
  if (!view.read(tensor) || !view.present()) checker.fail(name, "must be a tensor");
}

// The arguments of merge_attn_states: (out_a, lse_a, out_b, lse_b, out or None).
struct MergeCall {
  explicit MergeCall(ArgumentReader& reader) {
    for (PyObject*& object : objects) object = reader.object().ptr();
  }

  bool is_plain() const {
    if (modes_are_active()) return false;
    for (PyObject* object : objects) {
      if (object != Py_None && is_negative(object)) return false;
    }
    return true;
  }

  // See AttentionCall::read.
  bool read(Read what) {
    if (what == Read::kKnown && !have_plain_types(objects, std::size(objects))) return false;
    broadhead::read("out_a", objects[0], tensors.out_a);
    broadhead::read("lse_a", objects[1], tensors.lse_a);
    broadhead::read("out_b", objects[2], tensors.out_b);
    broadhead::read("lse_b", objects[3], tensors.lse_b);
    if (objects[4] != Py_None) broadhead::read("out", objects[4], tensors.out);
    if (what == Read::kKnown && !tensors.out_a.on_cuda()) return false;
    return key.add_kind(CallKind::kMerge) && key.add_tensor(tensors.out_a, true) &&
           key.add_tensor(tensors.out_b, true) && key.add_tensor(tensors.out, true) &&
           key.add_tensor(tensors.lse_a, false) && key.add_tensor(tensors.lse_b, false);
  }

  bool may_run_unseen() const { return is_plain() && !wants_gradient(); }

  bool wants_gradient() const {
    const std::pair<py::handle, const TensorView*> watched[] = {{objects[0], &tensors.out_a},
                                                                {objects[1], &tensors.lse_a},
                                                                {objects[2], &tensors.out_b},
                                                                {objects[3], &tensors.lse_b},
                                                                {objects[4], &tensors.out}};
    return broadhead::wants_gradient(watched, std::size(watched));
  }

  PyObject* objects[5];
  MergeTensors tensors;
  CallKey key;
};

py::object run(MergeLaunch& launch, MergeCall& call, bool is_first) {
  const DeviceGuard guard(launch.device);
  MergeTensors& tensors = call.tensors;
  const py::handle given = call.objects[4];
  py::object out = py::reinterpret_borrow<py::object>(given);
  if (given.is_none()) {
    out = launch.out.make(call.objects[0]);
    tensors.out.read_new(out);
  }
  const py::object lse = launch.lse.make(call.objects[1]);
  tensors.lse.read_new(lse);
  if (is_first) launch.params = pack(tensors);
  MergeStatesParams params = launch.params;
  params.out_a = tensors.out_a.data();
  params.out_b = tensors.out_b.data();
  params.out = tensors.out.data();
  params.lse_a = tensors.lse_a.as<const float>();
  params.lse_b = tensors.lse_b.as<const float>();
  params.softmax_lse = tensors.lse.as<float>();
  void* stream = current_stream(call.objects[0], tensors.out_a.device());
  const KernelLibrary& library = common_library();
  run_without_gil(false, [&](char* error) { return library.merge_states(&params, stream, error, kErrorSize); });
  if (!given.is_none()) mark_written(out);
  return py::make_tuple(out, lse);
}

}  // namespace

py::object run_known_merge(ArgumentReader& reader) {
  MergeCall call(reader);
  return run_if_known<MergeLaunch>(call, [&](MergeLaunch& launch) { return run(launch, call, false); });
}

py::object run_new_merge(ArgumentReader& reader) {
  const py::handle device = reader.object(), out = reader.object(), lse = reader.object();
  auto launch = std::make_shared<MergeLaunch>(MergeLaunch{py::reinterpret_borrow<py::int_>(device),
                                                          Allocation(py::reinterpret_borrow<py::tuple>(out)),
                                                          Allocation(py::reinterpret_borrow<py::tuple>(lse)),
                                                          {}});
  MergeCall call(reader);
  const bool has_key = call.read(Read::kFirst);
  py::object result = run(*launch, call, true);
  if (has_key) remember_call(call.key, std::move(launch), sizeof(MergeLaunch) + kPythonBytes);
  return result;
}

}  // namespace broadhead
