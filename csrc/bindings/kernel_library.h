// The kernel libraries beside the Python module, opened on first use.
#pragma once

#include <string>
#include <vector>

#include "bindings/tensor_view.h"
#include "host/params.h"

namespace broadhead {

// One libbroadhead_<family>.so. The function pointers are set when `error` is empty.
struct KernelLibrary {
  std::string family;
  std::string path;
  std::string error;  // why it did not load
  std::string archs;
  int cuda_version = 0;
  std::vector<const KernelInfo*> kernels;  // by their index

  decltype(&broadhead_forward) forward = nullptr;
  decltype(&broadhead_forward_workspace) forward_workspace = nullptr;
  decltype(&broadhead_backward) backward = nullptr;
  decltype(&broadhead_backward_workspace) backward_workspace = nullptr;
  decltype(&broadhead_scheduler_metadata) scheduler_metadata = nullptr;
  decltype(&broadhead_combine) combine = nullptr;
  decltype(&broadhead_append_kv) append_kv = nullptr;
  decltype(&broadhead_merge_states) merge_states = nullptr;
};

struct Kernel {
  const KernelLibrary* library;
  int index;
  const KernelInfo* info;
  ElementType dtype;      // of q
  ElementType kv_dtype;   // of k and v
  ElementType out_dtype;  // that of q, bf16 for 8-bit q

  bool is_decode() const { return info->phase == Phase::kDecode; }
};

// Where libraries are looked for: BROADHEAD_KERNEL_LIB_DIR when set, else the directory of the module.
const std::string& library_directory();

// Every library in that directory, loaded or with its error, by family name.
std::vector<const KernelLibrary*> all_libraries();

// The kernel of a row ("sm80", "sm80_fwd_d128_bf16") for calls of a direction. Throws BindingError: no library, one
// that does not load, no such kernel, a kernel of the other direction.
const Kernel& find_kernel(const std::string& family, const std::string& id, Direction direction);

// A library for what every family holds (the sources of common/), the portable family's when it is there: it is
// compiled for every architecture of a build. Throws BindingError when none loads.
const KernelLibrary& common_library();

}  // namespace broadhead
