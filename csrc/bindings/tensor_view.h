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

// The element types that kernels take.
enum class ElementType { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kInt32, kOther };

const char* name_of(ElementType type);

class TensorView {
 public:
  // Reads `tensor` by the DLPack exchange API of its type, else by its attributes; None gives an absent tensor. Throws
  // BindingError, naming `function` and `name`, unless it is a CUDA tensor of `type` (kOther: any) and rank `ndim` (0:
  // any).
  TensorView(pybind11::handle tensor, const char* function, const char* name, ElementType type, int ndim);

  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  bool present() const { return present_; }
  void* data() const { return data_; }
  int ndim() const { return ndim_; }
  ElementType type() const { return type_; }
  int device() const { return device_; }
  std::int64_t size(int dim) const { return shape_[dim < 0 ? dim + ndim_ : dim]; }
  std::int64_t stride(int dim) const { return strides_[dim < 0 ? dim + ndim_ : dim]; }
  std::int64_t numel() const;
  std::string describe() const;  // "bf16 (2, 128, 8, 64) on cuda:0"

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int kMaxDims = 6;

  void read_dlpack(const DLTensor& tensor);
  void read_attributes(pybind11::handle tensor);

  bool present_ = false;
  bool on_cuda_ = false;
  int ndim_ = 0;
  int device_ = -1;
  ElementType type_ = ElementType::kOther;
  void* data_ = nullptr;
  // Of the tensor itself when DLPack gave them, else of the arrays below.
  const std::int64_t* shape_ = nullptr;
  const std::int64_t* strides_ = nullptr;
  std::int64_t own_shape_[kMaxDims];
  std::int64_t own_strides_[kMaxDims];
};

// Appends what validation reads of `tensor` (None included): dtype, device, shape, strides, and with `alignment` the
// address modulo 16. False when its type has no exchange API.
bool append_signature(pybind11::handle tensor, bool alignment, std::string& signature);

// The stream that torch works on at `device`: by the exchange API of the tensor's type, else from torch.cuda.
void* current_stream(pybind11::handle tensor, int device);

}  // namespace broadhead
