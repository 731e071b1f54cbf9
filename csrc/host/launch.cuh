// What launchers of every kernel family do on the host: error text, limits of a device, the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <mutex>
#include <utility>

#include "common/dependent_launch.h"
#include "host/cuda_check.h"
#include "host/params.h"

namespace broadhead {

// What an error text tells of a call, of either direction.
struct CallShape {
  int batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v, page_size, num_splits;

  CallShape(const AttnParams& params) : CallShape(params, params.page_size) {}
  CallShape(const AttnBwdParams& params) : CallShape(params, 0) {}

 private:
  template <class Params>
  CallShape(const Params& p, int page_size)
      : batch(p.batch),
        seqlen_q(p.seqlen_q),
        seqlen_k(p.seqlen_k),
        num_heads_q(p.num_heads_q),
        num_heads_kv(p.num_heads_kv),
        head_dim(p.head_dim),
        head_dim_v(p.head_dim_v),
        page_size(page_size),
        num_splits(p.num_splits) {}
};

// The launch of one kernel for one call: writes its error text.
struct CallReport {
  const char* kernel_id;
  CallShape call;
  int smem_bytes;
  char* error;
  std::size_t error_size;

  // Writes the error text and returns 1. `more` is what else it says of the call, ", name value" for each.
  int fail(const char* step, cudaError_t status, const char* more = "") const {
    char shape[256];
    std::snprintf(shape, sizeof(shape),
                  "batch %d, seqlen_q %d, seqlen_k %d, heads %d/%d, head_dim %d/%d, page_size %d, num_splits %d%s, "
                  "shared memory %d bytes",
                  call.batch, call.seqlen_q, call.seqlen_k, call.num_heads_q, call.num_heads_kv, call.head_dim,
                  call.head_dim_v, call.page_size, call.num_splits, more, smem_bytes);
    return check_cuda(status, kernel_id, step, shape, error, error_size);
  }
};

// What a launcher must know of a kernel on a device.
struct KernelLimits {
  int multiprocessors = 0;
  int resident = 0;               // blocks that fit a multiprocessor
  bool dependent_launch = false;  // the device has programmatic dependent launch
};

// Lets CTAs of the kernel take more than 48 KB of shared memory, which is checked against what the device offers, and
// finds its limits. Returns 0, or 1 with an error text.
template <class Kernel>
int prepare_kernel(Kernel kernel, int threads, int device, const CallReport& report, KernelLimits& limits) {
  int available = 0, major = 0;
  for (const auto& [attribute, value] : {std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &available},
                                         std::pair{cudaDevAttrComputeCapabilityMajor, &major},
                                         std::pair{cudaDevAttrMultiProcessorCount, &limits.multiprocessors}}) {
    if (const cudaError_t status = cudaDeviceGetAttribute(value, attribute, device)) {
      return report.fail("cudaDeviceGetAttribute", status);
    }
  }
  if (report.smem_bytes > available) {
    std::snprintf(report.error, report.error_size, "%s needs %d bytes of shared memory a block, device %d offers %d",
                  report.kernel_id, report.smem_bytes, device, available);
    return 1;
  }
  if (const cudaError_t status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, report.smem_bytes)) {
    return report.fail("cudaFuncSetAttribute", status);
  }
  if (const cudaError_t status =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&limits.resident, kernel, threads, report.smem_bytes)) {
    return report.fail("cudaOccupancyMaxActiveBlocksPerMultiprocessor", status);
  }
  limits.dependent_launch = major >= kDependentLaunchMajor;
  return 0;
}

// Prepares one kernel once on each device. A launcher has a static one for each kernel; threads may share it.
class PreparedKernel {
  static constexpr int kMaxDevices = 64;
  KernelLimits known_[kMaxDevices];
  std::atomic<unsigned long long> prepared_{0};  // a bit a device: its entry of `known_` is there
  std::mutex mutex_;

 public:
  // The limits on the current device. Returns 0, or 1 with an error text.
  template <class Kernel>
  int prepare(Kernel kernel, int threads, const CallReport& report, KernelLimits& limits) {
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device)) return report.fail("cudaGetDevice", status);
    const unsigned long long bit = 1ull << (device % kMaxDevices);
    if (!(prepared_.load(std::memory_order_acquire) & bit)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!(prepared_.load(std::memory_order_relaxed) & bit)) {  // no other thread came first
        if (prepare_kernel(kernel, threads, device, report, known_[device % kMaxDevices])) return 1;
        prepared_.fetch_or(bit, std::memory_order_release);
      }
    }
    limits = known_[device % kMaxDevices];
    return 0;
  }
};

struct LaunchShape {
  dim3 grid;
  int threads;
  int smem_bytes = 0;
  bool dependent = false;  // it may begin before the end of what is in front of it on the stream
  int cluster = 1;         // blocks
};

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                          Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace broadhead
