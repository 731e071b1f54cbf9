// The table of known calls. The GIL guards it; what dies with an entry may run Python code, so nothing dies in a
// look-up.
#include "bindings/call_table.h"

#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace broadhead {
namespace {

// A Launch takes about 2 KB with what Python keeps for it, a key about 1 KB: some 10,000 kinds of calls.
constexpr std::size_t kMaxBytes = 32u << 20;
// What an entry takes besides its key and its Launch: nodes of the map, reference counts.
constexpr std::size_t kEntryBytes = 160;

struct KnownCall {
  std::vector<std::uint64_t> words;  // its key
  std::vector<py::object> types;     // of numbers in the key: the key holds their addresses
  std::shared_ptr<void> launch;
};

struct Table {
  std::unordered_multimap<std::uint64_t, KnownCall> calls;  // by the hash of the key
  std::size_t bytes = 0;
  std::size_t max_bytes = kMaxBytes;
};

Table& table() {
  static auto* held =
      new Table();  // for the life of the process: Python objects must not be freed after the interpreter
  return *held;
}

const KnownCall* find(const CallKey& key) {
  const auto [begin, end] = table().calls.equal_range(key.hash());
  for (auto entry = begin; entry != end; ++entry) {
    const std::vector<std::uint64_t>& words = entry->second.words;
    if (words.size() == static_cast<std::size_t>(key.size()) &&
        std::memcmp(words.data(), key.words(), sizeof(std::uint64_t) * words.size()) == 0) {
      return &entry->second;
    }
  }
  return nullptr;
}

}  // namespace

std::shared_ptr<void> find_call(const CallKey& key) {
  const KnownCall* known = find(key);
  return known == nullptr ? nullptr : known->launch;
}

void remember_call(const CallKey& key, std::shared_ptr<void> launch, std::size_t bytes) {
  if (find(key) != nullptr) return;
  bytes += kEntryBytes + sizeof(std::uint64_t) * static_cast<std::size_t>(key.size());
  if (table().bytes + bytes > table().max_bytes) forget_calls();
  KnownCall call{{key.words(), key.words() + key.size()}, {}, std::move(launch)};
  for (int i = 0; i < key.type_count(); ++i) {
    call.types.push_back(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(key.types()[i])));
  }
  table().calls.emplace(key.hash(), std::move(call));
  table().bytes += bytes;
}

void forget_calls() {
  // What dies with the calls may run Python code, which must find the table as it is.
  std::unordered_multimap<std::uint64_t, KnownCall> forgotten;
  forgotten.swap(table().calls);
  table().bytes = 0;
}

py::tuple known_calls_size() { return py::make_tuple(table().calls.size(), table().bytes); }

void bound_known_calls(std::size_t bytes) { table().max_bytes = bytes > 0 ? bytes : kMaxBytes; }

}  // namespace broadhead
