// The QK and PV GEMMs of a warp on an n_block; 8-bit K and V are converted to fp16 on the way.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "common/device.h"
#include "decode/traits.h"
#include "mma_sync/atoms.h"
#include "mma_sync/fragments.h"

namespace broadhead::decode {

using namespace mma_sync;

// Converts two e4m3 values (the low or the high half of `bytes`) to two fp16 values, exactly.
template <int kHalf>
BROADHEAD_DEVICE std::uint32_t widen(std::uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  using Two = cutlass::Array<cutlass::float_e4m3_t, 2>;
  const auto two = static_cast<std::uint16_t>(bytes >> (16 * kHalf));
  const auto pair = cutlass::NumericArrayConverter<cutlass::half_t, cutlass::float_e4m3_t, 2>::convert(
      reinterpret_cast<const Two&>(two));
  return reinterpret_cast<const std::uint32_t&>(pair);
#else
  // Sign, exponent and mantissa move to their places; the exponent's bias is 7 instead of 15 (OCP 8-bit Floating Point
  // Specification), so times 2^8. NaN becomes 480.
  const std::uint32_t spread = __byte_perm(bytes, 0, kHalf == 0 ? 0x1404 : 0x3424);
  const std::uint32_t bits = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 1);
  const __half2 pair = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.f));
  return reinterpret_cast<const std::uint32_t&>(pair);
#endif
}

// Shared address of 16-byte unit `unit` of row `row` of Q: subtiles of 64 columns, swizzled like a slice.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t q_offset(int row, int unit) {
  return unit / 8 * (Traits::kTileM * 128) + row * 128 + ((unit % 8) ^ (row & 7)) * 16;
}

// The lane's address of Q for load_q_fragment: row lane % 16, the unit of the warp's first column or the one behind it.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t q_lane_address(const typename Traits::SharedStorage& smem, int first_col, int lane) {
  return smem_address(smem.q) + q_offset<Traits>(lane & 15, first_col / 8 + (lane >> 4));
}

template <class Traits>
using QFragments = std::uint32_t[Traits::kQInRegisters ? Traits::kSteps + Traits::kBesideSteps : 1][Traits::kMmaM][4];

// The offset in a slice from which a lane loads the B fragments of K: two units of 16 keys.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t k_lane_offset(int lane) {
  return slice_offset<Traits>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// The same for the rows of K beside a slice of V.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t beside_lane_offset(int lane) {
  return beside_offset<Traits>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// The offset in a slice from which a lane loads the B fragments of V, transposed.
template <class Traits>
BROADHEAD_DEVICE std::uint32_t v_lane_offset(int lane) {
  return slice_offset<Traits>(lane & 15, lane >> 4);
}

// S += q K^T over the warp's columns of K, which lie beside a slice of V.
template <class Traits>
BROADHEAD_DEVICE void qk_gemm_beside(float (&s)[Traits::kMmaM][Traits::kMmaN][4], const QFragments<Traits>& q_registers,
                                     std::uint32_t k) {
  using Element = typename Traits::Element;
  static_assert(Traits::kBesideSteps == 1 && Traits::kQInRegisters, "rows with qv have tiles of 16 rows");
  const auto& a = q_registers[Traits::kSteps];
  BROADHEAD_UNROLL
  for (int pair = 0; pair < Traits::kMmaN / 2; ++pair) {
    std::uint32_t b[4];
    ldmatrix_x4(b, k + pair * (16 * Traits::kBesideBytes));
    BROADHEAD_UNROLL
    for (int half = 0; half < 2; ++half) {
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kMmaM; ++m) mma<Element>(s[m][2 * pair + half], a[m], b[2 * half], b[2 * half + 1]);
    }
  }
}

// S += Q K^T over the warp's columns of a slice of K; `k` is the lane's address. With qv S += qv V^T of a slice of V.
template <class Traits>
BROADHEAD_DEVICE void qk_gemm(float (&s)[Traits::kMmaM][Traits::kMmaN][4], const QFragments<Traits>& q_registers,
                              std::uint32_t q, std::uint32_t k) {
  using Element = typename Traits::Element;
  // One load brings 16 keys x two units of 16 bytes: one step of 16-bit K, two of 8-bit K.
  constexpr int kStepsPerLoad = Traits::k8Bit ? 2 : 1;
  BROADHEAD_UNROLL
  for (int load = 0; load < Traits::kSteps / kStepsPerLoad; ++load) {
    std::uint32_t a[kStepsPerLoad][Traits::kMmaM][4];
    if constexpr (!Traits::kQInRegisters) {
      BROADHEAD_UNROLL
      for (int i = 0; i < kStepsPerLoad; ++i) {
        load_q_fragment<Traits>(a[i], q, load * kStepsPerLoad + i);
      }
    }
    BROADHEAD_UNROLL
    for (int pair = 0; pair < Traits::kMmaN / 2; ++pair) {
      std::uint32_t b[4];
      ldmatrix_x4(b, slice_step<Traits>(k, pair * 16, 2 * load));
      BROADHEAD_UNROLL
      for (int half = 0; half < 2; ++half) {
        BROADHEAD_UNROLL
        for (int i = 0; i < kStepsPerLoad; ++i) {
          std::uint32_t b0, b1;
          if constexpr (Traits::k8Bit) {
            // These are columns 4 t to 4 t + 3 of a step of 16; those of Q are permuted in the same way (QTile).
            b0 = widen<0>(b[2 * half + i]);
            b1 = widen<1>(b[2 * half + i]);
          } else {
            b0 = b[2 * half];
            b1 = b[2 * half + 1];
          }
          BROADHEAD_UNROLL
          for (int m = 0; m < Traits::kMmaM; ++m) {
            if constexpr (Traits::kQInRegisters) {
              mma<Element>(s[m][2 * pair + half], q_registers[load * kStepsPerLoad + i][m], b0, b1);
            } else {
              mma<Element>(s[m][2 * pair + half], a[i][m], b0, b1);
            }
          }
        }
      }
    }
  }
}

// O += P V over the warp's columns of a slice of V; `v` is the lane's address. `take_p(p, step)` gives the A fragments
// of the 16 keys of a step.
template <class Traits, class TakeP>
BROADHEAD_DEVICE void pv_gemm(float (&o)[Traits::kMmaM][Traits::kOTiles][4], const TakeP& take_p, std::uint32_t v) {
  using Element = typename Traits::Element;
  constexpr int kTilesPerLoad = Traits::k8Bit ? 4 : 2;
  BROADHEAD_UNROLL
  for (int step = 0; step < Traits::kTileN / 16; ++step) {
    std::uint32_t p[Traits::kMmaM][4];
    take_p(p, step);
    BROADHEAD_UNROLL
    for (int load = 0; load < Traits::kOTiles / kTilesPerLoad; ++load) {
      std::uint32_t b[4];
      ldmatrix_x4_trans(b, slice_step<Traits>(v, step * 16, 2 * load));
      BROADHEAD_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int tile = load * kTilesPerLoad + half * (kTilesPerLoad / 2);
        if constexpr (Traits::k8Bit) {
          // In a unit of 16 columns the even ones are one tile of O, the odd ones the next.
          std::uint32_t even[2], odd[2];
          BROADHEAD_UNROLL
          for (int i = 0; i < 2; ++i) {
            const std::uint32_t sorted = __byte_perm(b[2 * half + i], 0, 0x3120);
            even[i] = widen<0>(sorted);
            odd[i] = widen<1>(sorted);
          }
          BROADHEAD_UNROLL
          for (int m = 0; m < Traits::kMmaM; ++m) {
            mma<Element>(o[m][tile], p[m], even[0], even[1]);
            mma<Element>(o[m][tile + 1], p[m], odd[0], odd[1]);
          }
        } else {
          BROADHEAD_UNROLL
          for (int m = 0; m < Traits::kMmaM; ++m) mma<Element>(o[m][tile], p[m], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
}

// The column, counted from the warp's first, of accumulator element `c` (0 or 1) of tile `tile`.
template <class Traits>
BROADHEAD_DEVICE int o_column(int tile, int c, int lane) {
  return Traits::k8Bit ? tile / 2 * 16 + (lane % 4) * 4 + c * 2 + tile % 2 : tile * 8 + (lane % 4) * 2 + c;
}

}  // namespace broadhead::decode
