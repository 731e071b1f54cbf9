// Scratch memory through the exchange API of a tensor's type, and the current device through torch.
#include "bindings/resources.h"

#include "bindings/attention_call.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace broadhead {

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

Question::Question(py::object function) : function_(std::move(function)) {
  PyObject* const object = function_.ptr();
  if (PyCFunction_CheckExact(object)) {
    const int flags = PyCFunction_GET_FLAGS(object);
    if (flags != METH_NOARGS && flags != METH_O) return;
    direct_ = PyCFunction_GET_FUNCTION(object);
    self_ = PyCFunction_GET_SELF(object);
  } else if (Py_TYPE(object) == &PyMethodDescr_Type) {
    auto* const method = reinterpret_cast<PyMethodDescrObject*>(object);
    if (method->d_method->ml_flags != METH_NOARGS) return;
    direct_ = method->d_method->ml_meth;
    type_ = method->d_common.d_type;
  }
}

py::object Question::ask(py::handle object) const {
  if (direct_ == nullptr || (type_ != nullptr && !PyObject_TypeCheck(object.ptr(), type_))) {
    return owned(PyObject_CallOneArg(function_.ptr(), object.ptr()));
  }
  return owned(type_ != nullptr ? direct_(object.ptr(), nullptr) : direct_(self_, object.ptr()));
}

Scratch::Scratch(py::handle q, int device, std::int64_t size) {
  if (size == 0) return;
  if (allocate(exchange_api(q), device, size)) {
    data_ = reinterpret_cast<float*>(static_cast<char*>(managed_->dl_tensor.data) + managed_->dl_tensor.byte_offset);
    return;
  }
  // Without the API, or where it failed: torch has the better words, and its own exception when memory is out.
  tensor_ = q.attr("new_empty")(size, py::arg("dtype") = py::module_::import("torch").attr("float32"));
  data_ = reinterpret_cast<float*>(tensor_.attr("data_ptr")().cast<std::uintptr_t>());
}

Scratch::~Scratch() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

bool Scratch::allocate(const DLPackExchangeAPI* api, int device, std::int64_t size) {
  if (api == nullptr || api->managed_tensor_allocator == nullptr) return false;
  std::int64_t stride = 1;
  DLTensor like{nullptr, {kDLCUDA, device}, 1, {kDLFloat, 32, 1}, &size, &stride, 0};
  const auto ignore = [](void*, const char*, const char*) {};
  if (api->managed_tensor_allocator(&like, &managed_, nullptr, ignore) == 0) return true;
  PyErr_Clear();
  managed_ = nullptr;
  return false;
}

DeviceGuard::DeviceGuard(const py::int_& device)
    : previous_(owned(PyObject_CallOneArg(hooks().exchange_device.ptr(), device.ptr()))) {
  // Indices are small, and small ints are one object each.
  if (previous_.is(device) || previous_.equal(device)) previous_ = py::object();
}

DeviceGuard::~DeviceGuard() {
  if (!previous_) return;
  py::error_scope keep;
  PyObject* result = PyObject_CallOneArg(hooks().restore_device.ptr(), previous_.ptr());
  if (result == nullptr) PyErr_WriteUnraisable(hooks().restore_device.ptr());
  Py_XDECREF(result);
}

}  // namespace broadhead
