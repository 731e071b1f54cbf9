// The QK and PV GEMMs of a step: S += Q K^T over a K chunk, O += P V over a V chunk.
#pragma once

#include "mma_sync/atoms.h"
#include "mma_sync/fragments.h"
#include "sm80/forward/traits.h"

namespace broadhead::sm80 {

using namespace mma_sync;

// Shared addresses of a lane for every fragment load of its warp. The 16-byte unit inside a row is (unit ^ row % 8):
// the row term is folded in here, so that a step of 16 columns is one XOR with step * 32 and everything else an
// immediate.
template <class Traits>
struct LaneAddresses {
  std::uint32_t q;  // A fragments of Q: rows of this warp
  std::uint32_t p;  // A fragments of P in shared memory
  std::uint32_t k;  // offset of the B fragments of K inside a stage
  std::uint32_t v;  // offset of the (transposed) B fragments of V inside a stage

  BROADHEAD_DEVICE LaneAddresses(typename Traits::SharedStorage& smem, int warp_m, int warp_n, int lane) {
    const int swizzle = lane & 7;
    const int a_row = warp_m * Traits::kRowsPerWarp + (lane & 15);
    const int a_unit = (lane >> 4) ^ swizzle;
    q = smem_address(smem.q) + a_row * 128 + a_unit * 16;
    p = smem_address(smem.p) + a_row * 128 + a_unit * 16;
    if constexpr (Traits::kMmaN % 2 == 0) {  // 16 keys x 16 columns a load
      const int row = warp_n * Traits::kKeysPerWarp + (lane & 7) + ((lane >> 4) << 3);
      k = row * 128 + ((((lane >> 3) & 1) ^ swizzle) * 16);
    } else {  // 8 keys x 32 columns a load
      const int row = warp_n * Traits::kKeysPerWarp + (lane & 7);
      k = row * 128 + (((lane >> 3) ^ swizzle) * 16);
    }
    const int subtile = warp_n / Traits::kWarpsPerSubtile;
    const int unit = (lane >> 4) | ((warp_n % Traits::kWarpsPerSubtile) * (8 / Traits::kWarpsPerSubtile));
    v = subtile * (Traits::kVChunk * 128) + (lane & 15) * 128 + ((unit ^ swizzle) * 16);
  }
};

// S += Q[:, chunk] K[:, chunk]^T; `chunk` is a constant after unrolling. `q_registers` is used when Q lives in
// registers.
template <class Traits, class QRegisters>
BROADHEAD_DEVICE void qk_gemm(float (&s)[Traits::kMmaM][Traits::kMmaN][4], const QRegisters& q_registers,
                              std::uint32_t q, std::uint32_t k, int chunk) {
  using Element = typename Traits::Element;
  constexpr int kSteps = min_int(Traits::kKChunk, Traits::kHeadDim) / 16;
  constexpr int kStepBytes = Traits::kTileN * 128;  // one subtile of K
  const int first_step = chunk * (Traits::kKChunk / 16);
  if constexpr (Traits::kMmaN % 2 == 0) {
    constexpr int kPairs = Traits::kMmaN / 2;
    // Where S is small there are registers to load fragments one step ahead of their use.
    constexpr int kBuffers = Traits::kSharedP ? 2 : 1;
    std::uint32_t a[kBuffers][Traits::kMmaM][4];
    std::uint32_t b[kBuffers][kPairs][4];
    const auto load_step = [&](int step) {
      if constexpr (!Traits::kQInRegisters) load_q_fragment<Traits>(a[step % kBuffers], q, first_step + step);
      BROADHEAD_UNROLL
      for (int n = 0; n < kPairs; ++n) {
        ldmatrix_x4(b[step % kBuffers][n], (k ^ ((step % 4) * 32)) + (step / 4) * kStepBytes + n * (16 * 128));
      }
    };
    if constexpr (kBuffers == 2) load_step(0);
    BROADHEAD_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if (Traits::kHeadDim % Traits::kKChunk != 0 && (first_step + step) * 16 >= Traits::kHeadDim) break;
      if (step + kBuffers - 1 < kSteps) load_step(step + kBuffers - 1);
      const auto& b_step = b[step % kBuffers];
      BROADHEAD_UNROLL
      for (int n = 0; n < kPairs; ++n) {
        BROADHEAD_UNROLL
        for (int m = 0; m < Traits::kMmaM; ++m) {
          if constexpr (Traits::kQInRegisters) {
            mma<Element>(s[m][2 * n], q_registers[step][m], b_step[n][0], b_step[n][1]);
            mma<Element>(s[m][2 * n + 1], q_registers[step][m], b_step[n][2], b_step[n][3]);
          } else {
            mma<Element>(s[m][2 * n], a[step % kBuffers][m], b_step[n][0], b_step[n][1]);
            mma<Element>(s[m][2 * n + 1], a[step % kBuffers][m], b_step[n][2], b_step[n][3]);
          }
        }
      }
    }
  } else {
    static_assert(Traits::kMmaN == 1 && !Traits::kQInRegisters);
    BROADHEAD_UNROLL
    for (int step = 0; step < kSteps; step += 2) {
      std::uint32_t a[2][Traits::kMmaM][4];
      std::uint32_t b[4];
      load_q_fragment<Traits>(a[0], q, first_step + step);
      load_q_fragment<Traits>(a[1], q, first_step + step + 1);
      ldmatrix_x4(b, (k ^ ((step % 4) * 32)) + (step / 4) * kStepBytes);
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kMmaM; ++m) {
        mma<Element>(s[m][0], a[0][m], b[0], b[1]);
        mma<Element>(s[m][0], a[1][m], b[2], b[3]);
      }
    }
  }
}

// O += P[:, 16 keys] V[16 keys, chunk columns]: step `step` of V chunk `chunk`, with the A fragments of those keys.
template <class Traits>
BROADHEAD_DEVICE void pv_step(float (&o)[Traits::kMmaM][Traits::kOTiles][4], const std::uint32_t (&a)[Traits::kMmaM][4],
                              std::uint32_t v, int chunk, int step, int warp_n, int head_dim_v) {
  const int col_chunk = chunk % Traits::kVColChunks;
  BROADHEAD_UNROLL
  for (int part = 0; part < Traits::kParts; ++part) {
    const int subtile = part * (Traits::kWarpsN / Traits::kWarpsPerSubtile);
    if (Traits::kHeadDim > 256) {  // one bucket serves 264..512: skip the columns this call does not have
      if (col_chunk * Traits::kVCols + (subtile + warp_n / Traits::kWarpsPerSubtile) * 64 >= head_dim_v) continue;
    }
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kPartTiles; ++n) {
      if (Traits::kVCols > Traits::kHeadDim && subtile * 64 + n * 16 >= Traits::kHeadDim) continue;  // bucket 96
      std::uint32_t b[4];
      ldmatrix_x4_trans(b, (v ^ (n * 32)) + subtile * (Traits::kVChunk * 128) + step * (16 * 128));
      const int tile = ((col_chunk * Traits::kParts + part) * Traits::kPartTiles + n) * 2;
      BROADHEAD_UNROLL
      for (int m = 0; m < Traits::kMmaM; ++m) {
        mma<typename Traits::Element>(o[m][tile], a[m], b[0], b[1]);
        mma<typename Traits::Element>(o[m][tile + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// O += P V over a V chunk, with P in shared memory.
template <class Traits>
BROADHEAD_DEVICE void pv_gemm(float (&o)[Traits::kMmaM][Traits::kOTiles][4], std::uint32_t p, std::uint32_t v,
                              int chunk, int warp_n, int head_dim_v) {
  constexpr int kSteps = Traits::kVChunk / 16;
  BROADHEAD_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int key_step = chunk / Traits::kVColChunks * kSteps + step;
    std::uint32_t a[Traits::kMmaM][4];
    BROADHEAD_UNROLL
    for (int m = 0; m < Traits::kMmaM; ++m) {
      ldmatrix_x4(a[m], (p ^ ((key_step % 4) * 32)) + (key_step / 4) * (Traits::kTileM * 128) + m * (16 * 128));
    }
    pv_step<Traits>(o, a, v, chunk, step, warp_n, head_dim_v);
  }
}

// O += exp(S) V over a whole n_block, with P in registers. The exponentials of 16 keys are independent of the
// multiplications of the 16 keys before, so the compiler can overlap them.
template <class Traits, int kStep = 0, class Softmax, class Exp2>
BROADHEAD_DEVICE void exp_pv_gemm(float (&o)[Traits::kMmaM][Traits::kOTiles][4],
                                  float (&s)[Traits::kMmaM][Traits::kMmaN][4], Softmax& softmax, float scale_log2,
                                  std::uint32_t v, int head_dim_v, Exp2 exp2) {
  static_assert(!Traits::kSharedP && Traits::kVChunks == 1);
  if constexpr (kStep < Traits::kTileN / 16) {
    softmax.template exponentiate<2 * kStep, 2>(s, scale_log2, exp2);
    std::uint32_t a[Traits::kMmaM][4];
    pack_p<typename Traits::Element>(a, s, kStep);
    pv_step<Traits>(o, a, v, 0, kStep, 0, head_dim_v);
    exp_pv_gemm<Traits, kStep + 1>(o, s, softmax, scale_log2, v, head_dim_v, exp2);
  }
}

// First column of accumulator `tile` of this warp (the lane adds (lane % 4) * 2).
template <class Traits>
BROADHEAD_DEVICE int o_column(int tile, int warp_n) {
  const int n = (tile / 2) % Traits::kPartTiles;
  const int part = (tile / 2) / Traits::kPartTiles % Traits::kParts;
  const int col_chunk = (tile / 2) / (Traits::kPartTiles * Traits::kParts);
  const int subtile = part * (Traits::kWarpsN / Traits::kWarpsPerSubtile) + warp_n / Traits::kWarpsPerSubtile;
  return col_chunk * Traits::kVCols + subtile * 64 + (warp_n % Traits::kWarpsPerSubtile) * Traits::kPartCols + n * 16 +
         (tile % 2) * 8;
}

// Writes P to shared memory, for the warps that own other columns of O.
template <class Traits>
BROADHEAD_DEVICE void store_p(typename Traits::SharedStorage& smem, const float (&s)[Traits::kMmaM][Traits::kMmaN][4],
                              int warp_m, int warp_n, int lane) {
  char* base = reinterpret_cast<char*>(smem.p);
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kMmaM; ++m) {
    BROADHEAD_UNROLL
    for (int n = 0; n < Traits::kMmaN; ++n) {
      const int col = warp_n * Traits::kKeysPerWarp + n * 8;
      const int row = warp_m * Traits::kRowsPerWarp + m * 16 + lane / 4;
      const int unit = (col / 8) % 8 ^ (row & 7);
      char* target = base + (col / 64) * (Traits::kTileM * 128) + row * 128 + unit * 16 + (lane % 4) * 4;
      *reinterpret_cast<std::uint32_t*>(target) = pack_pair<typename Traits::Element>(s[m][n][0], s[m][n][1]);
      *reinterpret_cast<std::uint32_t*>(target + 8 * 128) = pack_pair<typename Traits::Element>(s[m][n][2], s[m][n][3]);
    }
  }
}

}  // namespace broadhead::sm80
