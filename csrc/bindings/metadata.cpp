// Scheduler metadata: a request is packed once a kind, and filled in on the device.
#include <cstddef>
#include <iterator>
#include <memory>
#include <utility>

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/call_table.h"
#include "bindings/functions.h"
#include "bindings/kernel_library.h"
#include "bindings/packing.h"
#include "bindings/resources.h"

namespace py = pybind11;

namespace broadhead {
namespace {

const ArgumentChecker checker("run_new_metadata");

enum RequestTensor { kCacheSeqlens, kCuSeqlensQ, kCacheLeftpad, kMetadata, kTableOfPages, kRequestTensors };
constexpr const char* kNames[] = {"cache_seqlens", "cu_seqlens_q", "cache_leftpad", "out", "page_table"};

// Numbers of a plan, in the order of ScheduleNumbers (python/broadhead/run/metadata.py).
constexpr std::int32_t SchedulerMetadataParams::* kSchedule[] = {
    &SchedulerMetadataParams::batch,           &SchedulerMetadataParams::seqlen_q,
    &SchedulerMetadataParams::seqlen_k,        &SchedulerMetadataParams::seqlen_k_new,
    &SchedulerMetadataParams::window_left,     &SchedulerMetadataParams::window_right,
    &SchedulerMetadataParams::attention_chunk, &SchedulerMetadataParams::rows_per_token,
    &SchedulerMetadataParams::heads_in_grid,   &SchedulerMetadataParams::tile_m,
    &SchedulerMetadataParams::tile_n,          &SchedulerMetadataParams::num_splits,
    &SchedulerMetadataParams::target_ctas,     &SchedulerMetadataParams::metadata_tag};

// A request of get_scheduler_metadata: its tensors, and its other arguments as a tuple.
struct MetadataRequest {
  explicit MetadataRequest(ArgumentReader& reader) {
    for (PyObject*& object : objects) object = reader.object().ptr();
    numbers = reader.object();
  }

  // See AttentionCall::read. `numbers` None: there is no key.
  bool read(Read what) {
    if (what == Read::kKnown && !have_plain_types(objects, kRequestTensors)) return false;
    bool has_key = PyTuple_Check(numbers.ptr()) && key.add_kind(CallKind::kMetadata);
    for (int i = 0; i < kRequestTensors; ++i) {
      if (!tensors[i].read(objects[i])) checker.fail(kNames[i], "must be a tensor or None");
      has_key = has_key && key.add_tensor(tensors[i], false);
    }
    if (!tensors[kCacheSeqlens].present()) checker.fail(kNames[kCacheSeqlens], "must be a tensor, got None");
    if (what == Read::kKnown && !tensors[kCacheSeqlens].on_cuda()) return false;
    for (Py_ssize_t i = 0; has_key && i < PyTuple_GET_SIZE(numbers.ptr()); ++i) {
      const py::handle number = PyTuple_GET_ITEM(numbers.ptr(), i);
      const bool is_dtype = reinterpret_cast<PyObject*>(Py_TYPE(number.ptr())) == hooks().dtype.ptr();
      has_key = is_dtype ? key.add_permanent(number) : key.add_value(number);
    }
    return has_key;
  }

  // Integers are negated lazily by no public function, and have no gradient: only a mode is left to ask for.
  bool may_run_unseen() const { return !modes_are_active(); }

  PyObject* objects[kRequestTensors];
  TensorView tensors[kRequestTensors];
  py::handle numbers;  // None: requests of its kind are not to be known
  CallKey key;
};

// What all requests of a kind have in common.
struct MetadataLaunch {
  py::int_ device;
  py::object new_metadata;         // makes a buffer, given cache_seqlens
  py::object made_for;             // what a buffer is remembered by
  SchedulerMetadataParams params;  // without addresses
};

void check(const MetadataRequest& request, std::int64_t batch) {
  const TensorView* tensors = request.tensors;
  const TensorView& metadata = tensors[kMetadata];
  metadata.check("run_new_metadata", "out", ElementType::kInt32, 1);
  checker.require(contiguous(metadata) && batch >= 0 && metadata.size(0) >= metadata_size(batch), "out",
                  "contiguous, 1 + 4 * round_up(batch, 4) entries", metadata);
  for (const int lengths : {kCacheSeqlens, kCuSeqlensQ, kCacheLeftpad}) {
    tensors[lengths].check("run_new_metadata", kNames[lengths], ElementType::kInt32, 1);
    check_lengths(checker, kNames[lengths], tensors[lengths], &batch, lengths == kCuSeqlensQ ? 1 : 0);
  }
}

py::object run(const MetadataLaunch& launch, MetadataRequest& request, bool is_first) {
  const DeviceGuard guard(launch.device);
  TensorView* tensors = request.tensors;
  const py::handle like = request.objects[kCacheSeqlens];
  py::object metadata = py::reinterpret_borrow<py::object>(request.objects[kMetadata]);
  const bool was_given = !metadata.is_none();
  if (!was_given) {
    metadata = owned(PyObject_CallOneArg(launch.new_metadata.ptr(), like.ptr()));
    tensors[kMetadata].read_new(metadata);
  }
  if (is_first) check(request, launch.params.batch);
  SchedulerMetadataParams params = launch.params;
  params.metadata = tensors[kMetadata].as<std::int32_t>();
  params.seqused_k = tensors[kCacheSeqlens].as<const std::int32_t>();
  params.leftpad_k = tensors[kCacheLeftpad].as<const std::int32_t>();
  params.cu_seqlens_q = tensors[kCuSeqlensQ].as<const std::int32_t>();
  void* stream = current_stream(like, tensors[kCacheSeqlens].device());
  const KernelLibrary& library = common_library();
  run_without_gil(false, [&](char* error) { return library.scheduler_metadata(&params, stream, error, kErrorSize); });
  if (was_given) mark_written(metadata);
  owned(PyObject_CallFunctionObjArgs(hooks().remember_metadata.ptr(), metadata.ptr(), launch.made_for.ptr(), nullptr));
  return metadata;
}

}  // namespace

py::object run_known_metadata(ArgumentReader& reader) {
  MetadataRequest request(reader);
  return run_if_known<MetadataLaunch>(request, [&](MetadataLaunch& launch) { return run(launch, request, false); });
}

py::object run_new_metadata(ArgumentReader& reader) {
  const py::handle device = reader.object(), new_metadata = reader.object(), made_for = reader.object();
  const py::handle schedule = reader.object();
  PyObject* const* numbers = checker.items(schedule, "schedule", std::size(kSchedule));
  SchedulerMetadataParams params = make_params<SchedulerMetadataParams>();
  for (std::size_t i = 0; i < std::size(kSchedule); ++i) {
    params.*kSchedule[i] = checker.to_int32(numbers[i], "schedule");
  }
  auto launch = std::make_shared<MetadataLaunch>(MetadataLaunch{py::reinterpret_borrow<py::int_>(device),
                                                                py::reinterpret_borrow<py::object>(new_metadata),
                                                                py::reinterpret_borrow<py::object>(made_for), params});
  MetadataRequest request(reader);
  const bool has_key = request.read(Read::kFirst);
  py::object result = run(*launch, request, true);
  if (has_key) remember_call(request.key, std::move(launch), sizeof(MetadataLaunch) + kPythonBytes);
  return result;
}

}  // namespace broadhead
