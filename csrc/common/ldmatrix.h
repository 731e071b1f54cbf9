// ldmatrix through CuTe, at 32-bit shared addresses: four 8 x 8 matrices of 16 bits.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "common/macros.h"

namespace broadhead {

// What lies at a shared address, for CuTe's functions: they take references, and turn them into the address again.
BROADHEAD_DEVICE cute::uint128_t& smem_vector(std::uint32_t address) {
  return *static_cast<cute::uint128_t*>(__cvta_shared_to_generic(address));
}

BROADHEAD_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  cute::SM75_U32x4_LDSM_N::copy(smem_vector(address), r[0], r[1], r[2], r[3]);
}

BROADHEAD_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  cute::SM75_U16x8_LDSM_T::copy(smem_vector(address), r[0], r[1], r[2], r[3]);
}

}  // namespace broadhead
