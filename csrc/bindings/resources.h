// What a launch takes and gives back: scratch memory, and its device as the current one.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/dlpack.h"

namespace broadhead {

// The new reference that a function of Python's C API returned; throws the exception that null stands for.
pybind11::object owned(PyObject* result);

// A function of Python that every call asks, of one object or of none. A C function is called as what it is, without
// the way through Python's call protocol.
class Question {
 public:
  explicit Question(pybind11::object function);

  pybind11::object ask() const {
    return owned(direct_ ? direct_(self_, nullptr) : PyObject_CallNoArgs(function_.ptr()));
  }
  pybind11::object ask(pybind11::handle object) const;

 private:
  pybind11::object function_;
  PyCFunction direct_ = nullptr;  // null: by the protocol
  PyObject* self_ = nullptr;      // of a function of a module
  PyTypeObject* type_ = nullptr;  // of the objects that a method takes; null: it is no method
};

// fp32 elements that are free again once the work behind them on the current stream is done.
class Scratch {
 public:
  // On the device of `q`. Through the exchange API an allocation takes a quarter of the time that a tensor of Python
  // takes (230 instead of 900 ns on a CPU).
  Scratch(pybind11::handle q, int device, std::int64_t size);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }  // null when there are none

 private:
  bool allocate(const DLPackExchangeAPI* api, int device, std::int64_t size);

  DLManagedTensorVersioned* managed_ = nullptr;
  pybind11::object tensor_;
  float* data_ = nullptr;
};

// Makes a device the current one for its own life.
class DeviceGuard {
 public:
  explicit DeviceGuard(const pybind11::int_& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  pybind11::object previous_;
};

}  // namespace broadhead
