// Makes the Launch of a kind of calls from the records that decided it: CheckedCall (python/broadhead/call/check.py)
// and Plan (python/broadhead/plan/dispatch.py).
#include <string>

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/backward.h"
#include "bindings/packing.h"

namespace py = pybind11;

namespace broadhead {
namespace {

const ArgumentChecker checker("Launch");

std::int32_t integer(const py::object& record, const char* field) {
  return checker.to_int32(record.attr(field).ptr(), field);
}

const Kernel& kernel_of(py::handle plan, Direction direction) {
  const py::object row = plan.attr("row");
  return find_kernel(row.attr("family").cast<std::string>(), row.attr("id").cast<std::string>(), direction);
}

// What argument blocks of both directions name alike.
template <class Params>
Params decided(py::handle call, py::handle plan) {
  const py::object problem = call.attr("problem"), schedule = plan.attr("schedule");
  Params params = make_params<Params>();
  params.seqlen_q = integer(problem, "seqlen_q");
  params.seqlen_k = integer(problem, "seqlen_k");
  params.mask_rule = {integer(problem, "window_left"), integer(problem, "window_right"),
                      integer(problem, "attention_chunk")};
  params.softmax_scale = call.attr("softmax_scale").cast<float>();
  params.softcap = call.attr("softcap").cast<float>();
  params.num_splits = integer(schedule, "num_splits");
  params.max_blocks = integer(schedule, "max_blocks");
  return params;
}

}  // namespace

Launch::Launch(py::handle call, py::handle plan, int device_index, const py::tuple& new_out, const py::tuple& new_lse,
               const py::tuple& identity_of_metadata, const py::object& last_dispatch)
    : kernel(kernel_of(plan, Direction::kForward)),
      device(device_index),
      out(new_out),
      lse(new_lse),
      identity(identity_of_metadata),
      dispatch(last_dispatch),
      params(decided<AttnParams>(call, plan)),
      accepted_record(py::none()) {
  const py::object schedule = plan.attr("schedule");
  params.pack_gqa = integer(schedule, "pack_gqa");
  params.metadata_tag = integer(py::reinterpret_borrow<py::object>(plan), "metadata_tag");
  params.heads_per_section = integer(schedule, "heads_per_section");
  params.cell_blocks = integer(schedule, "cell_blocks");
}

BackwardLaunch::BackwardLaunch(py::handle call, py::handle plan, int device_index, bool deterministic)
    : kernel(kernel_of(plan, Direction::kBackward)), device(device_index), params(decided<AttnBwdParams>(call, plan)) {
  params.deterministic = deterministic;
}

}  // namespace broadhead
