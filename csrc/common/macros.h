// Function qualifiers that let the same header compile as CUDA and as plain C++ (host tests).
#pragma once

#if defined(__CUDACC__)
#define BROADHEAD_HOST_DEVICE __host__ __device__ __forceinline__
#define BROADHEAD_DEVICE __device__ __forceinline__
#define BROADHEAD_UNROLL _Pragma("unroll")
#define BROADHEAD_NO_UNROLL _Pragma("unroll 1")
#define BROADHEAD_ASSUME(condition) __builtin_assume(condition)
#else
#define BROADHEAD_HOST_DEVICE inline
#define BROADHEAD_UNROLL
#define BROADHEAD_NO_UNROLL
#define BROADHEAD_ASSUME(condition) static_cast<void>(condition)
#endif
