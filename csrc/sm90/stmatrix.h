// stmatrix through CuTe, at 32-bit shared addresses: four 8 x 8 matrices of 16 bits.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "common/ldmatrix.h"

namespace broadhead::sm90 {

BROADHEAD_DEVICE void stmatrix_x4(std::uint32_t address, const std::uint32_t (&x)[4]) {
  cute::SM90_U32x4_STSM_N::copy(x[0], x[1], x[2], x[3], smem_vector(address));
}

// Each matrix transposed.
BROADHEAD_DEVICE void stmatrix_x4_trans(std::uint32_t address, const std::uint32_t (&x)[4]) {
  cute::SM90_U16x8_STSM_T::copy(x[0], x[1], x[2], x[3], smem_vector(address));
}

}  // namespace broadhead::sm90
