// Neighbouring elements that one instruction loads or stores, and their conversion from and to fp32.
//
// Without CUTLASS, whose headers take longer to compile than the kernels that use this.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "common/macros.h"

namespace broadhead {

using E4m3 = __nv_fp8_storage_t;  // the bits of a float8_e4m3fn

// kCount elements in 32-bit words, which stay in registers; fewer than 4 bytes lie in the low bits of one.
template <class T, int kCount>
struct Vector {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  unsigned words[kWords];
};

// `source` and `target` must be aligned to the size of the vector.
template <int kCount, class T>
BROADHEAD_DEVICE Vector<T, kCount> load_vector(const T* source) {
  constexpr int kBytes = Vector<T, kCount>::kBytes;
  if constexpr (kBytes == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(source);
    return {{bits.x, bits.y, bits.z, bits.w}};
  } else if constexpr (kBytes == 8) {
    const uint2 bits = *reinterpret_cast<const uint2*>(source);
    return {{bits.x, bits.y}};
  } else if constexpr (kBytes == 4) {
    return {{*reinterpret_cast<const unsigned*>(source)}};
  } else if constexpr (kBytes == 2) {
    return {{*reinterpret_cast<const unsigned short*>(source)}};
  } else {
    return {{*reinterpret_cast<const unsigned char*>(source)}};
  }
}

template <class T, int kCount>
BROADHEAD_DEVICE void store_vector(T* target, const Vector<T, kCount>& x) {
  constexpr int kBytes = Vector<T, kCount>::kBytes;
  if constexpr (kBytes == 16) {
    *reinterpret_cast<uint4*>(target) = make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(target) = make_uint2(x.words[0], x.words[1]);
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<unsigned*>(target) = x.words[0];
  } else if constexpr (kBytes == 2) {
    *reinterpret_cast<unsigned short*>(target) = static_cast<unsigned short>(x.words[0]);
  } else {
    *reinterpret_cast<unsigned char*>(target) = static_cast<unsigned char>(x.words[0]);
  }
}

BROADHEAD_DEVICE float to_fp32(float, unsigned bits) { return __uint_as_float(bits); }
BROADHEAD_DEVICE float to_fp32(__nv_bfloat16, unsigned bits) { return __uint_as_float(bits << 16); }
BROADHEAD_DEVICE float to_fp32(E4m3, unsigned bits) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<E4m3>(bits & 0xff), __NV_E4M3)));
}
BROADHEAD_DEVICE float to_fp32(__half, unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffff)));
}

// Rounded to nearest even, in the low bits; e4m3 saturates.
BROADHEAD_DEVICE unsigned to_bits(float, float x) { return __float_as_uint(x); }
BROADHEAD_DEVICE unsigned to_bits(__nv_bfloat16, float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
BROADHEAD_DEVICE unsigned to_bits(__half, float x) { return __half_as_ushort(__float2half_rn(x)); }
BROADHEAD_DEVICE unsigned to_bits(E4m3, float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

template <class T, int kCount>
BROADHEAD_DEVICE void unpack(const Vector<T, kCount>& x, float (&y)[kCount]) {
  constexpr int kInWord = kCount / Vector<T, kCount>::kWords;
  BROADHEAD_UNROLL
  for (int i = 0; i < kCount; ++i) y[i] = to_fp32(T{}, x.words[i / kInWord] >> (i % kInWord * 8 * sizeof(T)));
}

template <class T, int kCount>
BROADHEAD_DEVICE Vector<T, kCount> pack(const float (&y)[kCount]) {
  constexpr int kInWord = kCount / Vector<T, kCount>::kWords;
  Vector<T, kCount> x{};
  BROADHEAD_UNROLL
  for (int i = 0; i < kCount; ++i) x.words[i / kInWord] |= to_bits(T{}, y[i]) << (i % kInWord * 8 * sizeof(T));
  return x;
}

}  // namespace broadhead
