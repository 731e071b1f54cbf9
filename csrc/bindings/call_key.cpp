// CallKey: tensors and values as words.
#include "bindings/call_key.h"

#include <cstring>

namespace py = pybind11;

namespace broadhead {
namespace {

// The first word of a value.
enum Tag : std::uint64_t { kNone, kFalse, kTrue, kInt, kFloat, kText, kSequence, kOtherInt, kOtherFloat, kPermanent };

std::uint64_t bits_of(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// False, without an exception, when `value` is no int of 64 bits.
bool to_int64(PyObject* value, std::uint64_t& word) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  word = static_cast<std::uint64_t>(number);
  return overflow == 0;
}

}  // namespace

bool CallKey::add_tensor(const TensorView& tensor, bool alignment) {
  if (!tensor.present()) return add(0);
  if (tensor.type() == ElementType::kOther) return false;
  const int ndim = tensor.ndim();
  if (size_ + 2 + 2 * ndim > kMaxWords) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data());
  words_[size_++] = static_cast<std::uint64_t>(ndim + 1) | static_cast<std::uint64_t>(tensor.type()) << 8 |
                    static_cast<std::uint64_t>(tensor.on_cuda()) << 16 |
                    static_cast<std::uint64_t>(alignment ? address & 15 : 0) << 24 |
                    static_cast<std::uint64_t>(static_cast<std::uint32_t>(tensor.device())) << 32;
  for (int dim = 0; dim < ndim; ++dim) words_[size_++] = static_cast<std::uint64_t>(tensor.size(dim));
  for (int dim = 0; dim < ndim; ++dim) words_[size_++] = static_cast<std::uint64_t>(tensor.stride(dim));
  return true;
}

bool CallKey::add_value(py::handle value) {
  PyObject* object = value.ptr();
  if (object == Py_None) return add(kNone);
  if (object == Py_False) return add(kFalse);
  if (object == Py_True) return add(kTrue);
  if (PyLong_CheckExact(object)) {
    std::uint64_t word;
    return to_int64(object, word) && add(kInt) && add(word);
  }
  if (PyFloat_CheckExact(object)) return add(kFloat) && add(bits_of(PyFloat_AS_DOUBLE(object)));
  if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
    bool added = add(kSequence) && add(static_cast<std::uint64_t>(size));
    for (Py_ssize_t i = 0; added && i < size; ++i) added = add_value(PySequence_Fast_GET_ITEM(object, i));
    return added;
  }
  if (PyUnicode_CheckExact(object)) return add_text(value);
  return add_number(value);
}

bool CallKey::add_permanent(py::handle object) {
  return add(kPermanent) && add(reinterpret_cast<std::uintptr_t>(object.ptr()));
}

bool CallKey::add_text(py::handle value) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (text == nullptr) {
    PyErr_Clear();
    return false;
  }
  bool added = add(kText) && add(static_cast<std::uint64_t>(size));
  for (Py_ssize_t at = 0; added && at < size; at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, text + at, static_cast<std::size_t>(size - at < 8 ? size - at : 8));
    added = add(word);
  }
  return added;
}

bool CallKey::add_number(py::handle value) {
  if (type_count_ == kMaxTypes || exchange_api(value) != nullptr || py::hasattr(value, "data_ptr")) return false;
  PyTypeObject* type = Py_TYPE(value.ptr());
  const bool is_int = PyIndex_Check(value.ptr()) != 0;
  PyObject* number = is_int                             ? PyNumber_Index(value.ptr())
                     : PyNumber_Check(value.ptr()) != 0 ? PyNumber_Float(value.ptr())
                                                        : nullptr;
  if (number == nullptr) {
    PyErr_Clear();
    return false;
  }
  std::uint64_t word = 0;
  const bool fits = is_int ? to_int64(number, word) : true;
  if (!is_int) word = bits_of(PyFloat_AsDouble(number));
  Py_DECREF(number);
  types_[type_count_++] = type;
  return fits && add(is_int ? kOtherInt : kOtherFloat) && add(reinterpret_cast<std::uintptr_t>(type)) && add(word);
}

std::uint64_t CallKey::hash() const {
  // Two chains of multiplications, for half the latency of one.
  constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15u;
  std::uint64_t even = static_cast<std::uint64_t>(size_), odd = kOdd;
  for (int i = 0; i + 1 < size_; i += 2) {
    even = (even ^ words_[i]) * kOdd;
    even ^= even >> 29;
    odd = (odd ^ words_[i + 1]) * kOdd;
    odd ^= odd >> 29;
  }
  if (size_ % 2 != 0) even = (even ^ words_[size_ - 1]) * kOdd;
  return even ^ (odd << 1 | odd >> 63);
}

}  // namespace broadhead
