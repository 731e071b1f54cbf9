// Stands in for csrc/common/ldmatrix.h.
#pragma once

#include "common/device.h"

namespace broadhead {

void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address);
void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address);

}  // namespace broadhead
