// Runs a forward call by its Launch: allocates what the kernel writes, sets the addresses, launches.
#include <iterator>

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/call_table.h"
#include "bindings/packing.h"
#include "bindings/resources.h"

namespace py = pybind11;

namespace broadhead {
namespace {

// Held for the life of the process: Python objects must not be freed after the interpreter.
Hooks* connected = nullptr;

void set_lse(const TensorView& lse, int q_ndim, AttnParams& params) {
  lse.check("forward", "softmax_lse", ElementType::kFloat32, q_ndim - 1);
  if (!lse.present()) return;
  params.softmax_lse = lse.as<float>();
  params.lse_batch_stride = lse.ndim() == 3 ? lse.stride(0) : 0;
  params.lse_head_stride = lse.stride(-2);
}

}  // namespace

const Hooks& hooks() {
  if (connected == nullptr) throw BindingError("_C.connect was not called");
  return *connected;
}

bool modes_are_active() {
  static PyObject* const level = PyUnicode_InternFromString("_current_level");
  PyObject* current = PyDict_GetItemWithError(hooks().forward_ad.ptr(), level);
  if (current == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (current != nullptr && PyLong_Check(current) && PyLong_AsLong(current) >= 0) return true;
  return PyObject_IsTrue(hooks().count_modes.ask().ptr()) != 0;
}

bool is_negative(py::handle tensor) { return hooks().is_negative.ask(tensor).ptr() == Py_True; }

void mark_written(py::handle tensor) { hooks().increment_version.ask(owned(PyTuple_Pack(1, tensor.ptr()))); }

AttentionCall::AttentionCall(py::handle tuple, CallKind key_kind) : kind(key_kind) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != kArgumentCount) {
    throw py::type_error("_C.forward: a call must be a tuple of " + std::to_string(kArgumentCount) + " arguments");
  }
  arguments = reinterpret_cast<PyTupleObject*>(tuple.ptr())->ob_item;
}

AttentionCall::AttentionCall(py::handle tuple, py::handle page_table, py::handle length)
    : AttentionCall(tuple, CallKind::kShared) {
  shared_page_table_object = page_table.ptr();
  shared_length = length.ptr();
}

bool AttentionCall::is_plain() const {
  if (modes_are_active()) return false;
  for (int argument = 0; argument < kArgumentCount; ++argument) {
    if (!is_tensor(argument) || !tensors[argument].present() || !tensors[argument].is_floating()) continue;
    if (is_negative(arguments[argument])) return false;
  }
  return true;
}

bool wants_gradient(const std::pair<py::handle, const TensorView*>* tensors, std::size_t count) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  if (hooks().is_grad_enabled.ask().ptr() != Py_True) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (!tensors[i].second->present()) continue;
    if (owned(PyObject_GetAttr(tensors[i].first.ptr(), requires_grad)).ptr() == Py_True) return true;
  }
  return false;
}

bool AttentionCall::wants_gradient() const {
  constexpr Argument kWatched[] = {kQ, kK, kV, kQv, kSinks, kOut};
  std::pair<py::handle, const TensorView*> watched[std::size(kWatched)];
  for (std::size_t i = 0; i < std::size(kWatched); ++i) watched[i] = {arguments[kWatched[i]], &tensors[kWatched[i]]};
  return broadhead::wants_gradient(watched, std::size(watched));
}

bool AttentionCall::read(Read what) {
  const bool is_known = what == Read::kKnown;
  const auto may_read = [&](py::handle object) { return !is_known || object.is_none() || has_plain_type(object); };
  bool has_key = key.add_kind(kind);
  for (int argument = 0; argument < kArgumentCount; ++argument) {
    const py::handle object = arguments[argument];
    if (is_tensor(argument)) {
      TensorView& tensor = tensors[argument];
      if (!may_read(object)) return false;
      if (!tensor.read(object)) {
        throw BindingError(std::string("_C.forward: ") + name_of(argument) + " must be a tensor or None, got " +
                           Py_TYPE(object.ptr())->tp_name);
      }
      has_key = has_key && key.add_tensor(tensor, is_aligned(argument));
    } else {
      has_key = has_key && key.add_value(object);
    }
    if (is_known && !(has_key && tensors[kQ].on_cuda())) return false;
  }
  if (!tensors[kQ].present()) throw BindingError("_C.forward: q must be a tensor, got None");
  if (!is_shared()) return has_key;
  if (!may_read(shared_page_table_object)) return false;
  if (!shared_page_table.read(shared_page_table_object) || !shared_page_table.present()) {
    throw BindingError(std::string("_C.forward: shared_page_table must be a tensor, got ") +
                       Py_TYPE(shared_page_table_object)->tp_name);
  }
  return has_key && key.add_tensor(shared_page_table, false) && key.add_value(shared_length);
}

Allocation::Allocation(const py::tuple& function_arguments_keywords)
    : function_(function_arguments_keywords[0]),
      arguments_(function_arguments_keywords[1]),
      keywords_(function_arguments_keywords[2]) {}

py::object Allocation::make(py::handle q) const {
  if (arguments_.is_none()) return owned(PyObject_CallOneArg(function_.ptr(), q.ptr()));
  return owned(PyObject_Call(function_.ptr(), arguments_.ptr(), keywords_.ptr()));
}

void connect(const Hooks& hooks) {
  delete connected;
  connected = new Hooks(hooks);
  set_plain_type_test(hooks.is_plain_type);
}

void set_addresses(const AttentionCall& call, AttnParams& params) {
  const TensorView* tensors = call.tensors;
  params.q = tensors[kQ].data();
  params.k = tensors[kK].data();
  params.v = tensors[kV].data();
  params.out = tensors[kOut].data();
  params.qv = tensors[kQv].data();
  params.q_descale = tensors[kQDescale].as<const float>();
  params.k_descale = tensors[kKDescale].as<const float>();
  params.v_descale = tensors[kVDescale].as<const float>();
  params.cu_seqlens_q = tensors[kCuSeqlensQ].as<const std::int32_t>();
  params.cu_seqlens_k = tensors[kCuSeqlensK].as<const std::int32_t>();
  params.seqused_q = tensors[kSequsedQ].as<const std::int32_t>();
  params.seqused_k = tensors[kSequsedK].as<const std::int32_t>();
  params.leftpad_k = tensors[kLeftpadK].as<const std::int32_t>();
  params.kv_batch_idx = tensors[kKvBatchIdx].as<const std::int32_t>();
  params.page_table = tensors[kPageTable].as<const std::int32_t>();
  params.prefix_lens = tensors[kPrefixLens].as<const std::int32_t>();
  set_mask_addresses(call, params.mask_values);
  params.sinks = tensors[kSinks].data();
  params.scheduler_metadata = tensors[kSchedulerMetadata].as<const std::int32_t>();
  params.shared_page_table = call.shared_page_table.as<const std::int32_t>();
}

void set_mask_addresses(const AttentionCall& call, MaskValues& values) {
  values.query_ranges = call.tensors[kQueryRanges].as<const std::int32_t>();
  values.tree_mask = call.tensors[kTreeMask].as<const std::int64_t>();
  values.causal_by_sequence = call.tensors[kCausalBySequence].data();
}

// Refuses metadata that was made for another call. What passed once passes again while its record is the same: the
// record tells what was written, and a buffer that was overwritten since is not refused either.
void check_metadata(Launch& launch, const AttentionCall& call, py::handle function) {
  const TensorView& metadata = call.tensors[kSchedulerMetadata];
  if (!metadata.present()) return;
  const py::object address = owned(PyLong_FromVoidPtr(metadata.data()));
  PyObject* record = PyDict_GetItemWithError(hooks().records.ptr(), address.ptr());
  if (record == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (record == nullptr || record == launch.accepted_record.ptr()) return;
  launch.accepted_record =
      hooks().check_identity(function, py::handle(call.arguments[kSchedulerMetadata]), *launch.identity);
}

AttentionRun::AttentionRun(Launch& launch, AttentionCall& call, py::handle q_object, bool need_lse, bool is_first)
    : kernel_(launch.kernel),
      out_was_given_(!py::handle(call.arguments[kOut]).is_none()),
      out_(py::reinterpret_borrow<py::object>(call.arguments[kOut])),
      lse_(py::none()) {
  const TensorView& q = call.tensors[kQ];
  if (!out_was_given_) {
    out_ = launch.out.make(q_object);
    call.tensors[kOut].read_new(out_);
  }
  TensorView lse;
  if (need_lse) {
    lse_ = launch.lse.make(q_object);
    lse.read_new(lse_);
  }
  if (is_first) pack_forward(call, kernel_, launch.params);
  params_ = launch.params;
  scratch_.emplace(q_object, q.device(), (params_.workspace_bytes + 3) / 4);
  params_.out_partial = scratch_->data();
  set_addresses(call, params_);
  set_lse(lse, q.ndim(), params_);
  stream_ = current_stream(q_object, q.device());
}

int AttentionRun::launch(char* error) const {
  return kernel_.library->forward(kernel_.index, &params_, stream_, error, kErrorSize);
}

py::object AttentionRun::finish() const {
  if (out_was_given_) mark_written(out_);
  return py::make_tuple(out_, lse_);
}

py::object run(Launch& launch, AttentionCall& call, py::handle function, bool need_lse, bool is_first) {
  static PyObject* const last = PyUnicode_InternFromString("last");
  if (PyObject_SetAttr(hooks().state.ptr(), last, launch.dispatch.ptr()) != 0) throw py::error_already_set();
  check_metadata(launch, call, function);
  const DeviceGuard guard(launch.device);
  const AttentionRun run(launch, call, call.arguments[kQ], need_lse, is_first);
  run_without_gil(is_first, [&](char* error) { return run.launch(error); });
  return run.finish();
}

}  // namespace broadhead
