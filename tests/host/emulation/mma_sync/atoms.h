// Stands in for csrc/mma_sync/atoms.h.
#pragma once

#include "common/ldmatrix.h"

namespace cute {
void cp_async_fence();
}

namespace broadhead::mma_sync {

void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  float (*convert)(std::uint16_t));
template <class Element>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  multiply_add(d, a, b0, b1, from_16_bits<Element>);
}

void copy_async(std::uint32_t target, const void* source, int bytes, bool live);
inline void cp_async_16(std::uint32_t target, const void* source, bool live) { copy_async(target, source, 16, live); }
inline void cp_async_4(std::uint32_t target, const void* source, bool live) { copy_async(target, source, 4, live); }
void wait_async(int pending);
template <int kPending>
void cp_async_wait() {
  wait_async(kPending);
}

inline void named_barrier_sync(int id, int threads) { meet_at_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { meet_at_barrier(id, threads, false); }

}  // namespace broadhead::mma_sync
