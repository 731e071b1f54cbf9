// Finds the Launch of a call that is like one that was validated and decided before, and runs the call by it.
#include <memory>

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/call_table.h"
#include "bindings/functions.h"

namespace py = pybind11;

namespace broadhead {
namespace {

py::object run_by_launch(py::handle function, bool need_lse, AttentionCall& call) {
  return run_if_known<Launch>(call, [&](Launch& launch) { return run(launch, call, function, need_lse, false); });
}

py::object run_and_remember(py::handle target, py::handle function, bool need_lse, AttentionCall& call) {
  const auto launch = py::cast<std::shared_ptr<Launch>>(target);
  const bool has_key = call.read(Read::kFirst);
  py::object result = run(*launch, call, function, need_lse, true);
  if (has_key) remember_call(call.key, launch, sizeof(Launch) + kPythonBytes);
  return result;
}

}  // namespace

py::object run_known(ArgumentReader& reader) {
  const py::handle function = reader.object();
  const bool need_lse = reader.truth();
  AttentionCall call(reader.object());
  return run_by_launch(function, need_lse, call);
}

py::object run_known_shared(ArgumentReader& reader) {
  const py::handle function = reader.object();
  const bool need_lse = reader.truth();
  const py::handle arguments = reader.object(), page_table = reader.object(), length = reader.object();
  AttentionCall call(arguments, page_table, length);
  return run_by_launch(function, need_lse, call);
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
