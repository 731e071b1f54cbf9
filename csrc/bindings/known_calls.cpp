// Finds the Launch of a call that is like one that was validated and decided before, and runs the call by it.
#include <cstring>
#include <unordered_map>
#include <vector>

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/call_key.h"
#include "bindings/functions.h"

namespace py = pybind11;

namespace broadhead {
namespace {

constexpr std::size_t kMaxKnown = 8192;
constexpr std::size_t kAlignedTensors =
    5;  // of signature(): callers pass first what kernels move 16 bytes of at a time

struct KnownCall {
  std::vector<std::uint64_t> words;  // its key
  py::object launch;
  Launch* target;                 // of `launch`
  std::vector<py::object> types;  // of numbers in the key
};

// By the hash of the key. The GIL guards it.
std::unordered_multimap<std::uint64_t, KnownCall>& known_calls() {
  static auto* known = new std::unordered_multimap<std::uint64_t, KnownCall>();
  return *known;
}

const KnownCall* find(const CallKey& key) {
  const auto [begin, end] = known_calls().equal_range(key.hash());
  for (auto entry = begin; entry != end; ++entry) {
    const std::vector<std::uint64_t>& words = entry->second.words;
    if (words.size() == static_cast<std::size_t>(key.size()) &&
        std::memcmp(words.data(), key.words(), sizeof(std::uint64_t) * words.size()) == 0) {
      return &entry->second;
    }
  }
  return nullptr;
}

bool add_call(const AttentionCall& call, CallKey& key) {
  for (int argument = 0; argument < kArgumentCount; ++argument) {
    const bool added = is_tensor(argument) ? key.add_tensor(call.tensors[argument], is_aligned(argument))
                                           : key.add_value(call.arguments[argument]);
    if (!added) return false;
  }
  // Behind a whole key, so that no other call has the same.
  return !call.is_shared() || (key.add_tensor(call.shared_page_table, false) && key.add_value(call.shared_length));
}

void remember(const CallKey& key, py::object launch) {
  if (find(key) != nullptr) return;  // another thread decided it meanwhile
  if (known_calls().size() >= kMaxKnown) forget_calls();
  KnownCall call{{key.words(), key.words() + key.size()}, launch, py::cast<Launch*>(launch), {}};
  for (int i = 0; i < key.type_count(); ++i) {
    call.types.push_back(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(key.types()[i])));
  }
  known_calls().emplace(key.hash(), std::move(call));
}

py::object run_if_known(py::handle function, bool need_lse, AttentionCall& call) {
  CallKey key;
  try {
    if (!call.has_plain_types()) return py::none();
    call.read();
  } catch (const std::exception&) {  // Python's among them. Whoever validates the call finds better words
    return py::none();
  }
  if (!call.tensors[kQ].on_cuda() || !add_call(call, key)) return py::none();
  const KnownCall* known = find(key);
  if (known == nullptr) return py::none();
  // From here on Python code may run, and another thread with it, which may forget the call.
  const py::object keep = known->launch;
  Launch& launch = *known->target;
  if (!call.is_plain() || call.wants_gradient()) return py::none();
  return run(launch, call, function, need_lse, false);
}

py::object run_and_remember(py::handle target, py::handle function, bool need_lse, AttentionCall& call) {
  const auto launch = py::reinterpret_borrow<py::object>(target);
  call.read();
  CallKey key;
  const bool has_key = add_call(call, key);
  py::object result = run(py::cast<Launch&>(launch), call, function, need_lse, true);
  if (has_key) remember(key, launch);
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

void forget_calls() {
  // What dies with the calls may run Python code, which must find the map as it is.
  std::unordered_multimap<std::uint64_t, KnownCall> forgotten;
  forgotten.swap(known_calls());
}

namespace {

// Adds what validation reads of a tensor or None; false when there is no key for it, as when it is no plain memory.
bool add_plain_tensor(py::handle object, bool alignment, CallKey& key) {
  TensorView tensor;
  if (object.is_none()) return key.add_tensor(tensor, false);
  return has_plain_type(object) && tensor.read(object) && !(tensor.is_floating() && is_negative(object)) &&
         key.add_tensor(tensor, alignment);
}

py::object to_bytes(const CallKey& key) {
  return py::bytes(reinterpret_cast<const char*>(key.words()), sizeof(std::uint64_t) * key.size());
}

}  // namespace

py::object signature(PyObject* const* tensors, Py_ssize_t count) {
  CallKey key;
  try {
    if (modes_are_active()) return py::none();
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!add_plain_tensor(tensors[i], i < kAlignedTensors, key)) return py::none();
    }
  } catch (const std::exception&) {  // Python's among them. Whoever validates the call finds better words
    return py::none();
  }
  return to_bytes(key);
}

py::object call_signature(ArgumentReader& reader) {
  const AttentionCall call(reader.object());
  const auto others = py::reinterpret_borrow<py::tuple>(reader.object());
  CallKey key;
  try {
    if (modes_are_active()) return py::none();
    for (int argument = 0; argument < kArgumentCount; ++argument) {
      const py::handle object = call.arguments[argument];
      const bool added =
          is_tensor(argument) ? add_plain_tensor(object, is_aligned(argument), key) : key.add_value(object);
      if (!added) return py::none();
    }
    for (const py::handle object : others) {
      const bool is_value = object.is_none() || PyBool_Check(object.ptr());
      const bool may_be_tensor = !is_value && (exchange_api(object) != nullptr || py::hasattr(object, "data_ptr"));
      if (!(may_be_tensor ? add_plain_tensor(object, false, key) : key.add_value(object))) return py::none();
    }
  } catch (const std::exception&) {
    return py::none();
  }
  // The bytes keep no type alive by whose address the key tells numbers apart.
  return key.type_count() > 0 ? py::none() : to_bytes(key);
}

}  // namespace broadhead
