// Reads Python tensors without torch's headers: the DLPack C exchange API where the type offers it, else attributes.
#include "bindings/tensor_view.h"

#include <unordered_map>
#include <utility>

namespace py = pybind11;

namespace broadhead {
namespace {

constexpr std::uint32_t kDlpackMajor = 1;

const DLPackExchangeAPI* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  void* pointer = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_DECREF(capsule);
  if (pointer == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  for (auto* header = static_cast<DLPackExchangeAPIHeader*>(pointer); header != nullptr; header = header->prev_api) {
    if (header->version.major == kDlpackMajor) return reinterpret_cast<const DLPackExchangeAPI*>(header);
  }
  return nullptr;
}

ElementType element_type(const DLDataType& dtype) {
  if (dtype.lanes != 1) return ElementType::kOther;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return ElementType::kBFloat16;
  if (dtype.code == kDLFloat && dtype.bits == 16) return ElementType::kFloat16;
  if (dtype.code == kDLFloat && dtype.bits == 32) return ElementType::kFloat32;
  if (dtype.code == kDLFloat8E4M3FN && dtype.bits == 8) return ElementType::kFloat8E4M3;
  if (dtype.code == kDLInt && dtype.bits == 32) return ElementType::kInt32;
  if (dtype.code == kDLInt && dtype.bits == 64) return ElementType::kInt64;
  if (dtype.code == kDLBool && dtype.bits == 8) return ElementType::kBool;
  return ElementType::kOther;
}

ElementType element_type(const std::string& name) {
  if (name == "torch.bfloat16") return ElementType::kBFloat16;
  if (name == "torch.float16") return ElementType::kFloat16;
  if (name == "torch.float32") return ElementType::kFloat32;
  if (name == "torch.float8_e4m3fn") return ElementType::kFloat8E4M3;
  if (name == "torch.int32") return ElementType::kInt32;
  if (name == "torch.int64") return ElementType::kInt64;
  if (name == "torch.bool") return ElementType::kBool;
  return ElementType::kOther;
}

// What the bindings know of a Python type.
struct TypeTraits {
  const DLPackExchangeAPI* api;  // null: it has none
  bool is_plain;
};

// The GIL guards what follows. Held for the life of the process: Python objects must not be freed after the
// interpreter.
py::object* plain_type_test = nullptr;
PyTypeObject* last_type = nullptr;
TypeTraits last_traits;

std::unordered_map<PyTypeObject*, TypeTraits>& known_types() {
  static auto* types = new std::unordered_map<PyTypeObject*, TypeTraits>();
  return *types;
}

TypeTraits find_traits(PyTypeObject* type) {
  TypeTraits traits{find_exchange_api(type), true};
  if (plain_type_test != nullptr) {
    const py::object test = *plain_type_test;
    traits.is_plain = py::cast<bool>(test(py::handle(reinterpret_cast<PyObject*>(type))));
  }
  return traits;
}

// Looked up once a type.
const TypeTraits& traits_of(py::handle tensor) {
  PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (type == last_type) return last_traits;
  auto found = known_types().find(type);
  if (found == known_types().end()) {
    const TypeTraits traits = find_traits(type);  // may run Python code, and that another thread
    found = known_types().find(type);
    if (found == known_types().end()) {
      Py_INCREF(type);  // a type that is a key must not be freed and its address reused
      found = known_types().emplace(type, traits).first;
    }
  }
  last_traits = found->second;
  last_type = type;
  return last_traits;
}

}  // namespace

void set_plain_type_test(py::object is_plain_type) {
  delete plain_type_test;
  plain_type_test = new py::object(std::move(is_plain_type));
  last_type = nullptr;
  known_types().clear();
}

bool has_plain_type(py::handle tensor) { return traits_of(tensor).is_plain; }

const DLPackExchangeAPI* exchange_api(py::handle tensor) { return traits_of(tensor).api; }

const char* name_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "fp32";
    case ElementType::kBFloat16:
      return "bf16";
    case ElementType::kFloat16:
      return "fp16";
    case ElementType::kFloat8E4M3:
      return "float8_e4m3fn";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    case ElementType::kBool:
      return "bool";
    case ElementType::kOther:
      break;
  }
  return "another dtype";
}

bool have_plain_types(PyObject* const* objects, int count) {
  for (int i = 0; i < count; ++i) {
    if (objects[i] != Py_None && !has_plain_type(objects[i])) return false;
  }
  return true;
}

TensorView::TensorView(py::handle tensor, const char* function, const char* name, ElementType type, int ndim) {
  if (!read(tensor)) {
    throw BindingError(std::string("_C.") + function + ": " + name + " must be a tensor or None, got " +
                       Py_TYPE(tensor.ptr())->tp_name);
  }
  check(function, name, type, ndim);
}

bool TensorView::read(py::handle tensor) {
  present_ = false;
  if (tensor.is_none()) return true;
  const TypeTraits traits = traits_of(tensor);
  if (traits.api != nullptr && traits.api->dltensor_from_py_object_no_sync != nullptr) {
    DLTensor dltensor;
    if (traits.api->dltensor_from_py_object_no_sync(tensor.ptr(), &dltensor) != 0) throw py::error_already_set();
    read_dlpack(dltensor);
  } else if (py::hasattr(tensor, "data_ptr")) {
    read_attributes(tensor);
  } else {
    return false;
  }
  if (data_ == nullptr && numel() > 0) {
    throw BindingError("a tensor of type " + std::string(Py_TYPE(tensor.ptr())->tp_name) + " has " +
                       std::to_string(numel()) +
                       " elements and no memory of its own: it wraps other tensors, or is a fake one; pass the tensor "
                       "inside it");
  }
  present_ = true;
  return true;
}

void TensorView::read_new(py::handle tensor) {
  try {
    read(tensor);
  } catch (const std::exception& exception) {  // Python's among them
    throw WatchedError(exception.what());
  }
}

void TensorView::check(const char* function, const char* name, ElementType type, int ndim) const {
  if (!present_) return;
  if (on_cuda_ && (type == ElementType::kOther || type == type_) && (ndim == 0 || ndim == ndim_)) return;
  throw BindingError(std::string("_C.") + function + ": " + name + " must be " +
                     (type == ElementType::kOther ? "a" : name_of(type)) + " tensor" +
                     (ndim == 0 ? "" : " of " + std::to_string(ndim) + " dimensions") + " on a CUDA device, got " +
                     describe());
}

void TensorView::read_dlpack(const DLTensor& tensor) {
  if (tensor.ndim > kMaxDims) throw BindingError("a tensor has " + std::to_string(tensor.ndim) + " dimensions");
  data_ = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  ndim_ = tensor.ndim;
  type_ = element_type(tensor.dtype);
  on_cuda_ = tensor.device.device_type == kDLCUDA || tensor.device.device_type == kDLCUDAManaged;
  device_ = tensor.device.device_id;
  shape_ = tensor.shape;
  strides_ = tensor.strides;
  if (strides_ == nullptr) {
    std::int64_t stride = 1;
    for (int dim = ndim_ - 1; dim >= 0; --dim) {
      own_strides_[dim] = stride;
      stride *= shape_[dim];
    }
    strides_ = own_strides_;
  }
}

void TensorView::read_attributes(py::handle tensor) {
  data_ = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
  type_ = element_type(py::str(tensor.attr("dtype")).cast<std::string>());
  on_cuda_ = tensor.attr("is_cuda").cast<bool>();
  device_ = on_cuda_ ? tensor.attr("device").attr("index").cast<int>() : 0;
  auto shape = tensor.attr("shape").cast<py::tuple>();
  auto strides = tensor.attr("stride")().cast<py::tuple>();
  ndim_ = static_cast<int>(shape.size());
  if (ndim_ > kMaxDims) throw BindingError("a tensor has " + std::to_string(ndim_) + " dimensions");
  for (int dim = 0; dim < ndim_; ++dim) {
    own_shape_[dim] = shape[dim].cast<std::int64_t>();
    own_strides_[dim] = strides[dim].cast<std::int64_t>();
  }
  shape_ = own_shape_;
  strides_ = own_strides_;
}

std::int64_t TensorView::numel() const {
  std::int64_t product = 1;
  for (int dim = 0; dim < ndim_; ++dim) product *= shape_[dim];
  return product;
}

std::string TensorView::describe() const {
  if (!present_) return "None";
  std::string text = std::string(name_of(type_)) + " (";
  for (int dim = 0; dim < ndim_; ++dim) text += (dim > 0 ? ", " : "") + std::to_string(shape_[dim]);
  return text + ") on " + (on_cuda_ ? "cuda:" + std::to_string(device_) : "a device that is not CUDA");
}

void* current_stream(py::handle tensor, int device) {
  const DLPackExchangeAPI* api = exchange_api(tensor);
  if (api != nullptr && api->current_work_stream != nullptr) {
    void* stream = nullptr;
    if (api->current_work_stream(kDLCUDA, device, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(device);
  return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<std::uintptr_t>());
}

}  // namespace broadhead
