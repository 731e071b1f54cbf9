// Finds the Launch of a call that is like one that was validated and decided before, and runs the call by it.
#include <memory>

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/call_table.h"
#include "bindings/functions.h"

namespace py = pybind11;

namespace broadhead {
namespace {

py::object run_if_known(py::handle function, bool need_lse, AttentionCall& call) {
  CallKey key;
  try {
    if (!call.has_plain_types()) return py::none();
    call.read();
  } catch (const std::exception&) {  // Python's among them. Whoever validates the call finds better words
    return py::none();
  }
  if (!call.tensors[kQ].on_cuda() || !call.add_to(key)) return py::none();
  // Held from here on: Python code may run, and another thread with it, which may forget the call.
  const std::shared_ptr<Launch> launch = find_call<Launch>(key);
  if (launch == nullptr || !call.is_plain() || call.wants_gradient()) return py::none();
  return none_if_watched([&] { return run(*launch, call, function, need_lse, false); });
}

py::object run_and_remember(py::handle target, py::handle function, bool need_lse, AttentionCall& call) {
  const auto launch = py::cast<std::shared_ptr<Launch>>(target);
  call.read();
  CallKey key;
  const bool has_key = call.add_to(key);
  py::object result = run(*launch, call, function, need_lse, true);
  if (has_key) remember_call(key, launch, sizeof(Launch) + kPythonBytes);
  return result;
}

}  // namespace

py::object run_known(ArgumentReader& reader) {
  const py::handle function = reader.object();
  const bool need_lse = reader.truth();
  AttentionCall call(reader.object());
  return run_if_known(function, need_lse, call);
}

py::object run_known_shared(ArgumentReader& reader) {
  const py::handle function = reader.object();
  const bool need_lse = reader.truth();
  const py::handle arguments = reader.object(), page_table = reader.object(), length = reader.object();
  AttentionCall call(arguments, page_table, length);
  return run_if_known(function, need_lse, call);
}

py::object run_new(ArgumentReader& reader) {
  const py::handle launch = reader.object(), function = reader.object();
  const bool need_lse = reader.truth();
  AttentionCall call(reader.object());
  return run_and_remember(launch, function, need_lse, call);
}

py::object run_new_shared(ArgumentReader& reader) {
  const py::handle launch = reader.object(), function = reader.object();
  const bool need_lse = reader.truth();
  const py::handle arguments = reader.object(), page_table = reader.object(), length = reader.object();
  AttentionCall call(arguments, page_table, length);
  return run_and_remember(launch, function, need_lse, call);
}

}  // namespace broadhead
