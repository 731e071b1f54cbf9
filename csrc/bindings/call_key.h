// What tells calls apart: everything that validation and dispatch read of their arguments, as a row of words.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/tensor_view.h"

namespace broadhead {

// What a key is of, its first word: keys of two kinds never meet.
enum class CallKind : std::uint64_t { kAttention, kShared, kAppend, kMerge, kMetadata };

class CallKey {
 public:
  static constexpr int kMaxWords = 320;
  static constexpr int kMaxTypes = 16;

  CallKey() {}
  CallKey(const CallKey&) = delete;
  CallKey& operator=(const CallKey&) = delete;

  // Adds what the key is of.
  bool add_kind(CallKind kind) { return add(static_cast<std::uint64_t>(kind)); }

  // Adds dtype, device, shape and strides, with `alignment` also the address modulo 16. Like add_value it returns false
  // when there is no key for the call: it must be validated each time.
  bool add_tensor(const TensorView& tensor, bool alignment);

  // Adds None, a bool, an int, a float, a str, or a tuple or list of such; another number by its type and value. A
  // tensor is none: reading it would wait for the device.
  bool add_value(pybind11::handle value);

  // Adds an object that lives as long as the process, such as a dtype, by its address.
  bool add_permanent(pybind11::handle object);

  const std::uint64_t* words() const { return words_; }
  int size() const { return size_; }
  std::uint64_t hash() const;

  // The types of "other numbers": they must live as long as a key that holds them.
  PyTypeObject* const* types() const { return types_; }
  int type_count() const { return type_count_; }

 private:
  bool add(std::uint64_t word) {
    if (size_ == kMaxWords) return false;
    words_[size_++] = word;
    return true;
  }
  bool add_number(pybind11::handle value);
  bool add_text(pybind11::handle value);

  int size_ = 0;
  int type_count_ = 0;
  std::uint64_t words_[kMaxWords];
  PyTypeObject* types_[kMaxTypes];
};

}  // namespace broadhead
