// Calls that append new keys before attention: known ones are one Launch of two kernels.
#include <memory>
#include <utility>

#include "bindings/append.h"
#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/call_table.h"
#include "bindings/functions.h"
#include "bindings/packing.h"
#include "bindings/resources.h"

namespace py = pybind11;

namespace broadhead {
namespace {

const ArgumentChecker checker("append_kv");

// What an append brings besides the arguments of attention: the fields of NewKeys (python/broadhead/api/append.py).
enum NewArgument {
  kNewK,
  kNewV,
  kCuSeqlensKNew,
  kRotaryCos,
  kRotarySin,
  kRotarySeqlens,
  kNewTensorCount,
  kRotaryInterleaved = kNewTensorCount,
  kNewCount
};

struct NewKeys {
  explicit NewKeys(py::handle tuple) { arguments = checker.items(tuple, "new keys", kNewCount); }

  // Reads the tensors and adds them to the key; see AttentionCall::read.
  bool read(Read what, CallKey& key) {
    if (what == Read::kKnown && !have_plain_types(arguments, kNewTensorCount)) return false;
    bool has_key = true;
    for (int i = 0; i < kNewTensorCount; ++i) {
      if (!tensors[i].read(arguments[i])) checker.fail("new keys", "must be tensors or None");
      has_key = has_key && key.add_tensor(tensors[i], false);
    }
    if (!tensors[kNewK].present() || !tensors[kNewV].present()) checker.fail("new keys", "must be there");
    return has_key && key.add_value(arguments[kRotaryInterleaved]);
  }

  bool is_plain() const {
    for (int i = 0; i < kNewTensorCount; ++i) {
      if (tensors[i].present() && tensors[i].is_floating() && is_negative(arguments[i])) return false;
    }
    return true;
  }

  bool wants_gradient() const {
    const std::pair<py::handle, const TensorView*> watched[] = {{arguments[kNewK], &tensors[kNewK]},
                                                                {arguments[kNewV], &tensors[kNewV]}};
    return broadhead::wants_gradient(watched, 2);
  }

  bool interleaved() const { return arguments[kRotaryInterleaved] == Py_True; }

  PyObject* const* arguments;
  TensorView tensors[kNewTensorCount];
};

// The two kernels of a call: append, then attention on the rotated q and the new lengths.
struct AppendLaunch {
  std::shared_ptr<Launch> attention;
  AppendKvParams params;  // without addresses
  py::object dispatch;    // what says that an append ran by its kernel
};

// A call and what it appends first.
struct AppendingCall {
  AppendingCall(py::handle tuple, py::handle new_keys) : call(tuple, CallKind::kAppend), fresh(new_keys) {}

  bool read(Read what) {
    const bool has_key = call.read(what);
    if (what == Read::kKnown && !has_key) return false;
    return fresh.read(what, key) && has_key;
  }

  bool may_run_unseen() const {
    return call.is_plain() && fresh.is_plain() && !call.wants_gradient() && !fresh.wants_gradient();
  }

  AttentionCall call;
  NewKeys fresh;
  CallKey& key = call.key;  // what is appended follows the arguments of attention
};

// Without rotary no query is given.
AppendTensors tensors_of(const AttentionCall& call, const NewKeys& fresh, const TensorView& q_out,
                         const TensorView& seqlens_out) {
  static const TensorView absent;
  const bool rotates = fresh.tensors[kRotaryCos].present();
  const TensorView* given = call.tensors;
  return {given[kK],
          given[kV],
          fresh.tensors[kNewK],
          fresh.tensors[kNewV],
          given[kSequsedK],
          seqlens_out,
          rotates ? given[kQ] : absent,
          rotates ? q_out : absent,
          fresh.tensors[kRotaryCos],
          fresh.tensors[kRotarySin],
          fresh.tensors[kRotarySeqlens],
          rotates ? given[kCuSeqlensQ] : absent,
          fresh.tensors[kCuSeqlensKNew],
          given[kPageTable],
          given[kKvBatchIdx],
          given[kKDescale],
          given[kVDescale]};
}

py::object empty_like(py::handle tensor) { return owned(PyObject_CallOneArg(hooks().empty_like.ptr(), tensor.ptr())); }

// All that may fail comes before the first launch: a call that is refused has written nothing.
py::object run(const AppendLaunch& launch, AttentionCall& call, const NewKeys& fresh, py::handle function,
               bool need_lse) {
  static PyObject* const last = PyUnicode_InternFromString("last");
  static PyObject* const append = PyUnicode_InternFromString("append");
  check_metadata(*launch.attention, call, function);
  const DeviceGuard guard(launch.attention->device);
  const bool rotates = fresh.tensors[kRotaryCos].present();
  py::object q = py::reinterpret_borrow<py::object>(call.arguments[kQ]);
  if (rotates) q = empty_like(q);
  const py::object lengths = empty_like(call.arguments[kSequsedK]);
  TensorView q_out, seqlens_out;
  if (rotates) q_out.read_new(q);
  seqlens_out.read_new(lengths);
  AppendKvParams params = launch.params;
  set_append_addresses(tensors_of(call, fresh, q_out, seqlens_out), params);
  // Attention gets what the append writes.
  if (rotates) call.tensors[kQ].read(q);
  call.tensors[kSequsedK].read(lengths);
  const AttentionRun attention(*launch.attention, call, q, need_lse, false);
  const KernelLibrary& library = common_library();
  bool appended = false;
  const auto mark_caches = [&] {
    mark_written(call.arguments[kK]);
    mark_written(call.arguments[kV]);
  };
  try {
    run_without_gil(false, [&](char* error) {
      const int status = library.append_kv(&params, attention.stream(), error, kErrorSize);
      appended = status == 0;
      return appended ? attention.launch(error) : status;
    });
  } catch (const BindingError&) {
    if (appended) mark_caches();
    throw;
  }
  mark_caches();
  PyObject* const state = hooks().state.ptr();
  if (PyObject_SetAttr(state, append, launch.dispatch.ptr()) != 0 ||
      PyObject_SetAttr(state, last, launch.attention->dispatch.ptr()) != 0) {
    throw py::error_already_set();
  }
  return attention.finish();
}

}  // namespace

py::object run_known_append(ArgumentReader& reader) {
  const py::handle function = reader.object();
  const bool need_lse = reader.truth();
  const py::handle call = reader.object();
  AppendingCall both(call, reader.object());
  return run_if_known<AppendLaunch>(
      both, [&](AppendLaunch& launch) { return run(launch, both.call, both.fresh, function, need_lse); });
}

py::object remember_append(ArgumentReader& reader) {
  const py::handle dispatch = reader.object();
  const bool causal_or_local = reader.truth();
  const py::handle call = reader.object();
  AppendingCall both(call, reader.object());
  AttentionCall attention(reader.object());
  const bool has_key = both.read(Read::kFirst), attention_has_key = attention.read(Read::kFirst);
  if (!has_key || !attention_has_key) return py::bool_(false);
  std::shared_ptr<Launch> found = find_call<Launch>(attention.key);
  if (found == nullptr) return py::bool_(false);
  const AppendTensors tensors = tensors_of(both.call, both.fresh, attention.tensors[kQ], attention.tensors[kSequsedK]);
  auto launch = std::make_shared<AppendLaunch>(
      AppendLaunch{std::move(found), pack_append(checker, tensors, {both.fresh.interleaved(), causal_or_local}),
                   py::reinterpret_borrow<py::object>(dispatch)});
  remember_call(both.key, std::move(launch), sizeof(AppendLaunch));
  return py::bool_(true);
}

}  // namespace broadhead
