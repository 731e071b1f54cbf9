// A fragments of mma.sync: Q from shared memory, P from the accumulators of S.
#pragma once

#include "common/device.h"
#include "mma_sync/atoms.h"

namespace broadhead::mma_sync {

// A fragments of 16 columns of Q, step `step` of them. Q lies in subtiles of 64 columns, kTileM rows of 128 bytes whose
// eight 16-byte units are swizzled by row % 8; `q` is the lane's address at step 0.
template <class Traits>
BROADHEAD_DEVICE void load_q_fragment(std::uint32_t (&a)[Traits::kMmaM][4], std::uint32_t q, int step) {
  BROADHEAD_UNROLL
  for (int m = 0; m < Traits::kMmaM; ++m) {
    ldmatrix_x4(a[m], (q ^ ((step % 4) * 32)) + (step / 4) * (Traits::kTileM * 128) + m * (16 * 128));
  }
}

// Two 8-key tiles of S (C layout) -> the A fragments of 16 keys of P.
template <class Element, int kMmaM, int kMmaN>
BROADHEAD_DEVICE void pack_p(std::uint32_t (&p)[kMmaM][4], const float (&s)[kMmaM][kMmaN][4], int step) {
  BROADHEAD_UNROLL
  for (int m = 0; m < kMmaM; ++m) {
    BROADHEAD_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto& tile = s[m][2 * step + half];
      p[m][2 * half] = pack_pair<Element>(tile[0], tile[1]);
      p[m][2 * half + 1] = pack_pair<Element>(tile[2], tile[3]);
    }
  }
}

}  // namespace broadhead::mma_sync
