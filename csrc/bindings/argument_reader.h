// Reads the positional arguments of a METH_FASTCALL function one after the other.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/tensor_view.h"

namespace broadhead {

// Refuses arguments of a function by name.
class ArgumentChecker {
 public:
  explicit ArgumentChecker(const char* function) : function_(function) {}

  [[noreturn]] void fail(const char* name, const std::string& what) const {
    throw BindingError(std::string("_C.") + function_ + ": " + name + " " + what);
  }

  void require(bool condition, const char* name, const char* accepted, const TensorView& got) const {
    if (!condition) fail(name, std::string("must be ") + accepted + ", got " + got.describe());
  }

  // The items of a tuple that must have `count` of them; they live as long as it.
  PyObject* const* items(pybind11::handle tuple, const char* name, Py_ssize_t count) const {
    if (PyTuple_Check(tuple.ptr()) && PyTuple_GET_SIZE(tuple.ptr()) == count) {
      return reinterpret_cast<PyTupleObject*>(tuple.ptr())->ob_item;
    }
    throw pybind11::type_error(std::string("_C.") + function_ + ": " + name + " must be a tuple of " +
                               std::to_string(count) + " items");
  }

  static long long to_integer(PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }

  std::int32_t to_int32(PyObject* object, const char* name) const {
    const long long value = to_integer(object);
    if (value < INT32_MIN || value > INT32_MAX) fail(name, "must fit 32 bits, got " + std::to_string(value));
    return static_cast<std::int32_t>(value);
  }

 protected:
  const char* function_;
};

// Pybind11's own dispatch costs more than the launch it serves at 30 arguments, so hot functions read their own.
class ArgumentReader : public ArgumentChecker {
 public:
  ArgumentReader(const char* function, PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected)
      : ArgumentChecker(function), next_(arguments) {
    if (count == expected) return;
    throw pybind11::type_error(std::string("_C.") + function + ": takes " + std::to_string(expected) +
                               " positional arguments, got " + std::to_string(count));
  }

  pybind11::handle peek() const { return *next_; }

  pybind11::handle object() { return *next_++; }

  bool truth() {
    const int value = PyObject_IsTrue(*next_++);
    if (value < 0) throw pybind11::error_already_set();
    return value == 1;
  }

  // None gives an absent view. `type` kOther takes any element type, `ndim` 0 any rank.
  TensorView optional_tensor(const char* name, ElementType type = ElementType::kOther, int ndim = 0) {
    return TensorView(*next_++, function_, name, type, ndim);
  }

  TensorView tensor(const char* name, ElementType type = ElementType::kOther, int ndim = 0) {
    if (*next_ == Py_None) fail(name, "must be a tensor, got None");
    return optional_tensor(name, type, ndim);
  }

  // A raw cudaStream_t; -1 is the stream that torch works on where `like` lives.
  void* stream(pybind11::handle like, int device) {
    const long long value = to_integer(*next_++);
    return value == -1 ? current_stream(like, device) : reinterpret_cast<void*>(static_cast<std::intptr_t>(value));
  }

 private:
  PyObject* const* next_;
};

}  // namespace broadhead
