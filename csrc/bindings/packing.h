// How tensors become fields of an argument block: what the functions of the module share.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

#include "bindings/argument_reader.h"
#include "host/params.h"

namespace broadhead {

constexpr std::size_t kErrorSize = 1024;

// Entries of scheduler metadata: common/scheduler_metadata.h.
constexpr std::int64_t metadata_size(std::int64_t batch) { return 1 + 4 * ((batch + 3) / 4 * 4); }

// Launches with the GIL released: a launch waits while the queue of the device is full. `launch(error)` returns 0, or
// writes why not. First launches, in which a kernel is prepared for its device, run one after the other.
template <class Launch>
void run_without_gil(bool is_first, const Launch& launch) {
  static std::mutex first_launches;
  char error[kErrorSize];
  error[0] = '\0';
  PyThreadState* const state = PyEval_SaveThread();
  int status;
  {
    std::unique_lock<std::mutex> lock(first_launches, std::defer_lock);
    if (is_first) lock.lock();
    status = launch(error);
  }
  PyEval_RestoreThread(state);
  if (status != 0) throw BindingError(error);
}

template <class Params>
Params make_params() {
  Params params{};
  params.struct_size = sizeof(Params);
  params.abi_version = kAbiVersion;
  return params;
}

// [B, S, H, D], [T, H, D] (batch stride unused) or [pages, page_size, H, D].
inline TensorStrides strides_of(const TensorView& tensor) {
  return {tensor.ndim() == 4 ? tensor.stride(0) : 0, tensor.stride(-3), tensor.stride(-2)};
}

// As strides_of, 0 along dimensions of one element: their stride means nothing, and would look misaligned.
inline TensorStrides used_strides(const TensorView& tensor) {
  const auto used = [&](int dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {tensor.ndim() == 4 ? used(0) : 0, used(-3), used(-2)};
}

inline bool last_dim_contiguous(const TensorView& tensor) { return tensor.size(-1) <= 1 || tensor.stride(-1) == 1; }

inline bool contiguous(const TensorView& tensor) {
  std::int64_t stride = 1;
  for (int dim = tensor.ndim() - 1; dim >= 0; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != stride) return false;
    stride *= tensor.size(dim);
  }
  return true;
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  bool same = a.ndim() == b.ndim();
  for (int dim = 0; same && dim < a.ndim(); ++dim) same = a.size(dim) == b.size(dim);
  return same;
}

// The DataType of an element type, which must be one that it has.
inline DataType data_type(ElementType type) {
  return type == ElementType::kBFloat16     ? DataType::kBFloat16
         : type == ElementType::kFloat16    ? DataType::kFloat16
         : type == ElementType::kFloat8E4M3 ? DataType::kFloat8E4M3
                                            : DataType::kFloat32;
}

// Checks an int32 vector with one entry a sequence (plus `extra`), or an absent one; it says the batch if none is
// known.
inline void check_lengths(const ArgumentChecker& checker, const char* name, const TensorView& lengths,
                          std::int64_t* batch, int extra = 0) {
  if (!lengths.present()) return;
  checker.require(contiguous(lengths), name, "contiguous", lengths);
  if (*batch < 0) *batch = lengths.size(0) - extra;
  if (lengths.size(0) < *batch + extra) {
    checker.fail(name, "must hold at least " + std::to_string(*batch + extra) + " entries, got " + lengths.describe());
  }
}

// Checks factors for 8-bit q, k or v, one for each sequence and KV head; 0 strides when absent.
inline DescaleStrides check_descale(const ArgumentChecker& checker, const char* name, const TensorView& descale,
                                    std::int64_t batch, std::int64_t heads) {
  if (!descale.present()) return {0, 0};
  checker.require(descale.size(0) == batch && descale.size(1) == heads, name, "[batch, heads of k]", descale);
  return {descale.stride(0), descale.stride(1)};
}

}  // namespace broadhead
