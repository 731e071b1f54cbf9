// The C ABI of a kernel library: checks the argument block, then hands it to the launcher that the table names.
#include <cstdio>

#include "host/cuda_check.h"
#include "host/derived.h"
#include "host/kernel_registry.h"
#include "kernels/append_kv.h"
#include "kernels/combine.h"
#include "kernels/mask_extents.h"
#include "kernels/merge_states.h"
#include "kernels/scheduler_metadata.h"

namespace broadhead {
namespace {

// A caller built against another params.h must not be read: its fields lie elsewhere.
template <class Params>
bool is_readable(const Params* params, const char* function, char* error, std::size_t error_size) {
  if (params == nullptr) {
    std::snprintf(error, error_size, "%s: params is null", function);
    return false;
  }
  if (params->struct_size != sizeof(Params) || params->abi_version != kAbiVersion) {
    std::snprintf(
        error, error_size,
        "%s: the argument block has ABI version %u and %u bytes, this library reads version %u and %zu bytes; "
        "install the Python module and the kernel libraries from one build",
        function, params->abi_version, params->struct_size, kAbiVersion, sizeof(Params));
    return false;
  }
  return true;
}

// The kernel of an index; null where there is none.
const RegisteredKernel* kernel_at(int index) { return index >= 0 && index < kKernelCount ? &kKernels[index] : nullptr; }

void* workspace_of(const AttnParams& params) { return params.out_partial; }
void* workspace_of(const AttnBwdParams& params) { return params.workspace; }
void set_workspace(AttnParams& params, void* workspace) { params.out_partial = static_cast<float*>(workspace); }
void set_workspace(AttnBwdParams& params, void* workspace) { params.workspace = workspace; }

// Works out the masks that are given as values; the rest of the workspace is the kernel's.
template <class Params>
int prepare_extents(Params& params, const char* kernel_id, void* stream, char* error, std::size_t error_size) {
  const std::int64_t bytes = mask_extent_bytes(params);
  char* const workspace = static_cast<char*>(workspace_of(params));
  if (bytes > 0 && (workspace == nullptr || params.workspace_bytes < bytes)) {
    std::snprintf(error, error_size, "%s: the workspace has %lld bytes, what it learns of its masks takes %lld",
                  kernel_id, static_cast<long long>(params.workspace_bytes), static_cast<long long>(bytes));
    return 1;
  }
  const int status = launch_mask_extents(params, workspace, static_cast<cudaStream_t>(stream));
  params.workspace_bytes -= bytes;
  set_workspace(params, params.workspace_bytes > 0 ? workspace + bytes : nullptr);
  return check_cuda(static_cast<cudaError_t>(status), kernel_id, "masks of sequences", "", error, error_size);
}

// Launches a kernel by its launcher for the direction of Params.
template <class Params, class Launcher>
int launch(int index, Launcher RegisteredKernel::* launcher, const Params* params, void* stream, const char* function,
           char* error, std::size_t error_size) {
  if (!is_readable(params, function, error, error_size)) return 1;
  const RegisteredKernel* kernel = kernel_at(index);
  if (kernel == nullptr) {
    std::snprintf(error, error_size, "%s: kernel index %d is not in [0, %d)", function, index, kKernelCount);
    return 1;
  }
  if (kernel->*launcher == nullptr) {
    std::snprintf(error, error_size, "%s: %s is a kernel of the other direction", function, kernel->info.id);
    return 1;
  }
  Params own = *params;
  derive(own);
  if (has_mask_values(own.mask_values) && prepare_extents(own, kernel->info.id, stream, error, error_size)) return 1;
  return (kernel->*launcher)(own, static_cast<cudaStream_t>(stream), error, error_size);
}

// Asks a kernel for its workspace by its function for the direction of Params.
template <class Params, class Workspace>
std::int64_t workspace(int index, Workspace RegisteredKernel::* ask, const Params* params) {
  const RegisteredKernel* kernel = kernel_at(index);
  char unused[1];
  if (!is_readable(params, "workspace", unused, sizeof(unused)) || kernel == nullptr || kernel->*ask == nullptr)
    return -1;
  Params own = *params;
  derive(own);
  const std::int64_t bytes = (kernel->*ask)(own);
  return bytes < 0 ? bytes : bytes + mask_extent_bytes(own);
}

}  // namespace
}  // namespace broadhead

std::uint32_t broadhead_abi_version() { return broadhead::kAbiVersion; }

const char* broadhead_build_archs() { return broadhead::kBuildArchs; }

int broadhead_cuda_version() { return CUDART_VERSION; }

int broadhead_kernel_count() { return broadhead::kKernelCount; }

const broadhead::KernelInfo* broadhead_kernel_info(int index) {
  const broadhead::RegisteredKernel* kernel = broadhead::kernel_at(index);
  return kernel != nullptr ? &kernel->info : nullptr;
}

int broadhead_kernel_shared_memory(int index) {
  const broadhead::RegisteredKernel* kernel = broadhead::kernel_at(index);
  return kernel != nullptr ? *kernel->shared_memory : -1;
}

int broadhead_forward(int index, const broadhead::AttnParams* params, void* stream, char* error,
                      std::size_t error_size) {
  return broadhead::launch(index, &broadhead::RegisteredKernel::forward, params, stream, "broadhead_forward", error,
                           error_size);
}

std::int64_t broadhead_forward_workspace(int index, const broadhead::AttnParams* params) {
  return broadhead::workspace(index, &broadhead::RegisteredKernel::forward_workspace, params);
}

std::int64_t broadhead_backward_workspace(int index, const broadhead::AttnBwdParams* params) {
  return broadhead::workspace(index, &broadhead::RegisteredKernel::backward_workspace, params);
}

int broadhead_backward(int index, const broadhead::AttnBwdParams* params, void* stream, char* error,
                       std::size_t error_size) {
  return broadhead::launch(index, &broadhead::RegisteredKernel::backward, params, stream, "broadhead_backward", error,
                           error_size);
}

int broadhead_scheduler_metadata(const broadhead::SchedulerMetadataParams* params, void* stream, char* error,
                                 std::size_t error_size) {
  if (!broadhead::is_readable(params, "broadhead_scheduler_metadata", error, error_size)) return 1;
  return broadhead::launch_scheduler_metadata(*params, static_cast<cudaStream_t>(stream), error, error_size);
}

int broadhead_combine(const broadhead::CombineParams* params, void* stream, char* error, std::size_t error_size) {
  if (!broadhead::is_readable(params, "broadhead_combine", error, error_size)) return 1;
  return broadhead::launch_combine(*params, static_cast<cudaStream_t>(stream), error, error_size);
}

int broadhead_append_kv(const broadhead::AppendKvParams* params, void* stream, char* error, std::size_t error_size) {
  if (!broadhead::is_readable(params, "broadhead_append_kv", error, error_size)) return 1;
  return broadhead::launch_append_kv(*params, static_cast<cudaStream_t>(stream), error, error_size);
}

int broadhead_merge_states(const broadhead::MergeStatesParams* params, void* stream, char* error,
                           std::size_t error_size) {
  if (!broadhead::is_readable(params, "broadhead_merge_states", error, error_size)) return 1;
  return broadhead::launch_merge_states(*params, static_cast<cudaStream_t>(stream), error, error_size);
}
