// Programmatic dependent launch: how a kernel lets the next one take its place early, and waits for the one before.
#pragma once

#include "common/macros.h"

namespace broadhead {

// Compute capability 9.0 and later have it; before, kernels of a stream run one after the other.
constexpr int kDependentLaunchMajor = 9;

// Once all CTAs have called it or ended, the next kernel of the stream may start if it was launched that way.
BROADHEAD_DEVICE void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Waits until the kernel before has ended and its writes are visible.
BROADHEAD_DEVICE void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

}  // namespace broadhead
