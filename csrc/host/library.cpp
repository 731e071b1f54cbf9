// The C ABI of a kernel library: checks the argument block, then hands it to the launcher that the table names.
#include <cstdio>

#include "host/kernel_registry.h"
#include "kernels/append_kv.h"
#include "kernels/combine.h"
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

}  // namespace
}  // namespace broadhead

std::uint32_t broadhead_abi_version() { return broadhead::kAbiVersion; }

const char* broadhead_build_archs() { return broadhead::kBuildArchs; }

int broadhead_cuda_version() { return CUDART_VERSION; }

int broadhead_kernel_count() { return broadhead::kForwardKernelCount; }

const char* broadhead_kernel_id(int index) {
  return index >= 0 && index < broadhead::kForwardKernelCount ? broadhead::kForwardKernels[index].id : nullptr;
}

int broadhead_kernel_shared_memory(int index) {
  return index >= 0 && index < broadhead::kForwardKernelCount ? *broadhead::kForwardKernels[index].shared_memory : -1;
}

int broadhead_forward(int index, const broadhead::AttnParams* params, void* stream, char* error,
                      std::size_t error_size) {
  if (!broadhead::is_readable(params, "broadhead_forward", error, error_size)) return 1;
  if (index < 0 || index >= broadhead::kForwardKernelCount) {
    std::snprintf(error, error_size, "broadhead_forward: kernel index %d is not in [0, %d)", index,
                  broadhead::kForwardKernelCount);
    return 1;
  }
  return broadhead::kForwardKernels[index].launch(*params, static_cast<cudaStream_t>(stream), error, error_size);
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
