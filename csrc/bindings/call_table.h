// The one table of calls that were validated and decided: what validation reads of a call -> the Launch that runs it.
#pragma once

#include <cstddef>
#include <exception>
#include <memory>

#include "bindings/call_key.h"

namespace broadhead {

// The Launch of a key, null when there is none. `Found` is what calls of the key's kind run by.
std::shared_ptr<void> find_call(const CallKey& key);

template <class Found>
std::shared_ptr<Found> find_call(const CallKey& key) {
  return std::static_pointer_cast<Found>(find_call(key));
}

// Remembers the Launch of a key, unless another thread came first. `bytes`: what the Launch takes, about. When all
// entries together take more than the table may, they are forgotten.
void remember_call(const CallKey& key, std::shared_ptr<void> launch, std::size_t bytes);

// What a call is read for.
enum class Read {
  kFirst,  // it was validated: its tensors are plain memory on a CUDA device
  kKnown,  // it may be like one before: no type of a tensor may override what torch does with it
};

// Runs a call by the Launch of one like it: run(launch). None where there was none, or where torch must see the call;
// whoever validates it then also finds better words for what is wrong with it. What a call must have: read(Read), which
// may throw and makes its `key`, and may_run_unseen(), which asks for modes, negated views and gradients.
template <class Found, class Call, class Run>
pybind11::object run_if_known(Call& call, const Run& run) {
  try {
    if (!call.read(Read::kKnown)) return pybind11::none();
  } catch (const std::exception&) {  // Python's among them
    return pybind11::none();
  }
  // Held from here on: Python code may run, and another thread with it, which may forget the call.
  const std::shared_ptr<Found> launch = find_call<Found>(call.key);
  if (launch == nullptr || !call.may_run_unseen()) return pybind11::none();
  try {
    return run(*launch);
  } catch (const WatchedError&) {
    return pybind11::none();
  }
}

void forget_calls();

// How many calls are known, and how many bytes they take: for tests.
pybind11::tuple known_calls_size();

// Bounds the table for tests; the bytes that it may take as it is built.
void bound_known_calls(std::size_t bytes);

}  // namespace broadhead
