// A Python tensor as the bindings see it: pointer, shape, strides, dtype, device. Borrowed for the length of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/dlpack.h"

namespace broadhead {

// Becomes broadhead.errors.KernelError in Python.
class BindingError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A tensor that torch made for a call has no memory of its own: a transform of torch.func watches what is made. The
// call is to go through the operators.
class WatchedError : public BindingError {
 public:
  using BindingError::BindingError;
};

// The element types that kernels take.
enum class ElementType { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kInt32, kInt64, kBool, kOther };

const char* name_of(ElementType type);

class TensorView {
 public:
  // Absent.
  TensorView() {}
  // Reads `tensor` and checks it.
  TensorView(pybind11::handle tensor, const char* function, const char* name, ElementType type, int ndim);

  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  // Reads `tensor` by the DLPack exchange API of its type, else by its attributes; None gives an absent tensor. Returns
  // false when it is no tensor. Throws when it has elements and no address: a tensor that wraps others has none.
  bool read(pybind11::handle tensor);

  // The same of a tensor that torch made just now; throws WatchedError where it has no memory.
  void read_new(pybind11::handle tensor);

  // Throws BindingError, naming `function` and `name`, unless it is absent or a CUDA tensor of `type` (kOther: any) and
  // rank `ndim` (0: any).
  void check(const char* function, const char* name, ElementType type, int ndim) const;

  bool present() const { return present_; }
  bool on_cuda() const { return present_ && on_cuda_; }
  bool is_floating() const {
    return type_ != ElementType::kInt32 && type_ != ElementType::kInt64 && type_ != ElementType::kBool;
  }
  void* data() const { return present_ ? data_ : nullptr; }
  int ndim() const { return ndim_; }
  ElementType type() const { return type_; }
  int device() const { return device_; }
  std::int64_t size(int dim) const { return shape_[dim < 0 ? dim + ndim_ : dim]; }
  std::int64_t stride(int dim) const { return strides_[dim < 0 ? dim + ndim_ : dim]; }
  std::int64_t numel() const;
  std::string describe() const;  // "bf16 (2, 128, 8, 64) on cuda:0"

  template <class T>
  T* as() const {  // null when absent
    return present_ ? static_cast<T*>(data_) : nullptr;
  }

 private:
  static constexpr int kMaxDims = 6;

  void read_dlpack(const DLTensor& tensor);
  void read_attributes(pybind11::handle tensor);

  bool present_ = false;
  // The rest means something once a tensor was read. A call has room for many that are absent: nothing is cleared.
  bool on_cuda_;
  int ndim_;
  int device_;
  ElementType type_;
  void* data_;
  // These point into the tensor itself when DLPack gave them, else at the arrays below.
  const std::int64_t* shape_;
  const std::int64_t* strides_;
  std::int64_t own_shape_[kMaxDims];
  std::int64_t own_strides_[kMaxDims];
};

// The exchange API of a tensor's type, null when it has none.
const DLPackExchangeAPI* exchange_api(pybind11::handle tensor);

// Sets the function that tells of a type whether its tensors are plain memory. Until then all are.
void set_plain_type_test(pybind11::object is_plain_type);

// Whether that function said so of the type of `tensor`. Reading another one may warn, and gives no memory.
bool has_plain_type(pybind11::handle tensor);

// The same of all tensors among `count` objects, each a tensor or None.
bool have_plain_types(PyObject* const* objects, int count);

// The stream that torch works on at `device`: by the exchange API of the tensor's type, else from torch.cuda.
void* current_stream(pybind11::handle tensor, int device);

}  // namespace broadhead
