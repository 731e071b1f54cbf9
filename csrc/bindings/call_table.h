// The one table of calls that were validated and decided: what validation reads of a call -> the Launch that runs it.
#pragma once

#include <cstddef>
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

void forget_calls();

// How many calls are known, and how many bytes they take: for tests.
pybind11::tuple known_calls_size();

// Bounds the table for tests; the bytes that it may take as it is built.
void bound_known_calls(std::size_t bytes);

}  // namespace broadhead
