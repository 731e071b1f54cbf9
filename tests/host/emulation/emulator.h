// Runs a kernel of mma.sync and cp.async on the CPU, to check its index maps and barriers: a fiber a thread, one CTA
// after the other. Warps run in a random order. A copy becomes visible at once, or as late as its wait allows: the
// first shows a stage that is refilled too early, the second one that is read too early.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "mma_sync/atoms.h"

Index threadIdx, blockIdx;

namespace broadhead {

namespace sm80 {
alignas(1024) char smem_bytes[227 * 1024];
}

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::printf("emulation, CTA %d, thread %d: %s\n", blockIdx.x, threadIdx.x, what);
  std::exit(1);
}

struct Copy {
  std::uint32_t target;
  const void* source;
  int bytes;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  std::vector<std::vector<Copy>> groups{1};  // cp.async; the last one is not committed yet
};

struct Barrier {
  int arrived, expected;
  long generation;
};

// What the lanes of a warp give to an instruction of all of them. Two slots: a lane may be one instruction ahead.
struct Exchange {
  int arrived;
  long generation;
  int instructions[32];
  char kind[2];
  std::uint32_t words[2][32][6];
};

struct Cta {
  std::vector<Thread> threads;
  Barrier barriers[16];
  Exchange warps[32];
  ucontext_t scheduler;
  std::function<void()> body;
  std::mt19937 random{1};
  bool early = false;
  long progress = 0;
};
inline Cta cta;

inline Thread& self() { return cta.threads[threadIdx.x]; }
inline void yield() { swapcontext(&self().context, &cta.scheduler); }
inline void run_body() {
  cta.body();
  self().done = true;
  yield();
}

// Gives `words`, waits for the other lanes, and returns the slot that holds what all gave.
inline const std::uint32_t (&exchange(char kind, std::initializer_list<std::uint32_t> words))[32][6] {
  Exchange& warp = cta.warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, slot = warp.instructions[lane]++ % 2;
  if (warp.arrived == 0) warp.kind[slot] = kind;
  if (warp.kind[slot] != kind) fail("the lanes of a warp are at different instructions");
  std::copy(words.begin(), words.end(), warp.words[slot][lane]);
  ++cta.progress;
  const long generation = warp.generation;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) yield();
  return warp.words[slot];
}

inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address, bool transposed) {
  if (address % 16 != 0) fail("the address of a matrix row is not a multiple of 16");
  const auto& lanes = exchange(transposed ? 't' : 'n', {address});
  const auto element = [&](int matrix, int row, int col) {
    std::uint16_t bits;
    std::memcpy(&bits, sm80::smem_bytes + lanes[8 * matrix + row][0] + 2 * col, 2);
    return static_cast<std::uint32_t>(bits);
  };
  const int outer = threadIdx.x % 32 / 4, inner = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    r[i] = transposed ? element(i, inner, outer) | element(i, inner + 1, outer) << 16
                      : element(i, outer, inner) | element(i, outer, inner + 1) << 16;
  }
}

inline void finish(const Copy& copy) {
  char* target = sm80::smem_bytes + copy.target;
  copy.source != nullptr ? std::memcpy(target, copy.source, copy.bytes) : std::memset(target, 0, copy.bytes);
}

// Runs one CTA of `threads` threads.
inline void run(int threads, Index block, bool early, const std::function<void()>& body) {
  cta.threads.resize(threads);
  cta.body = body;
  cta.early = early;
  blockIdx = block;
  std::memset(sm80::smem_bytes, 0xff, sizeof(sm80::smem_bytes));  // NaN
  std::memset(cta.barriers, 0, sizeof(cta.barriers));
  std::memset(cta.warps, 0, sizeof(cta.warps));
  for (Thread& thread : cta.threads) {
    thread.done = false;
    thread.groups = {{}};
    thread.stack.resize(128 * 1024);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, run_body, 0);
  }
  int live = threads, idle = 0;
  for (int warp = 0; live > 0;) {
    const long before = cta.progress + threads - live;
    for (int lane = 0; lane < 32; ++lane) {
      threadIdx = {warp * 32 + lane, 0, 0};
      if (self().done) continue;
      swapcontext(&cta.scheduler, &self().context);
      live -= self().done;
    }
    // A warp runs on for a while, so that it gets as far ahead of the others as barriers allow.
    const bool stuck = cta.progress + threads - live == before;
    idle = stuck ? idle + 1 : 0;
    if (idle > 4 * threads) fail("all threads wait");
    if (stuck || cta.random() % 8 == 0) warp = static_cast<int>(cta.random() % (threads / 32));
  }
  for (const Barrier& barrier : cta.barriers) {
    if (barrier.arrived != 0) fail("threads are left at a barrier");
  }
}

}  // namespace emulation

inline void meet_at_barrier(int id, int threads, bool wait) {
  using namespace emulation;
  if (id < 0 || id > 15) fail("there is no such barrier");
  if (threads == 0) threads = static_cast<int>(cta.threads.size());
  Barrier& barrier = cta.barriers[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) fail("a barrier of different numbers of threads");
  const long generation = barrier.generation;
  ++cta.progress;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (wait && barrier.generation == generation) yield();
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) { emulation::load_matrices(r, address, false); }
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  emulation::load_matrices(r, address, true);
}

namespace mma_sync {

inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                         float (*convert)(std::uint16_t)) {
  const auto& lanes = emulation::exchange('m', {a[0], a[1], a[2], a[3], b0, b1});
  const auto half = [&](std::uint32_t word, int i) { return convert(static_cast<std::uint16_t>(word >> 16 * i)); };
  const int lane = threadIdx.x % 32;
  for (int c = 0; c < 4; ++c) {
    const int row = lane / 4 + c / 2 * 8, col = lane % 4 * 2 + c % 2;
    for (int k = 0; k < 16; ++k) {
      d[c] += half(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
              half(lanes[col * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
  }
}

inline void copy_async(std::uint32_t target, const void* source, int bytes, bool live) {
  using namespace emulation;
  if (target % bytes != 0 || (live && reinterpret_cast<std::uintptr_t>(source) % bytes != 0)) fail("misaligned copy");
  const Copy copy{target, live ? source : nullptr, bytes};
  cta.early ? finish(copy) : self().groups.back().push_back(copy);
}

inline void wait_async(int pending) {
  auto& groups = emulation::self().groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const auto& copy : groups.front()) emulation::finish(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace mma_sync
}  // namespace broadhead

inline void __syncwarp() { broadhead::emulation::exchange('w', {}); }
inline std::uint32_t __ballot_sync(std::uint32_t, bool bit) {
  const auto& lanes = broadhead::emulation::exchange('b', {bit ? 1u : 0u});
  std::uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= lanes[lane][0] << lane;
  return bits;
}
inline std::uint32_t __shfl_xor_sync(unsigned, std::uint32_t x, int lanes) {
  return broadhead::emulation::exchange('x', {x})[threadIdx.x % 32 ^ lanes][0];
}

inline void cute::cp_async_fence() { broadhead::emulation::self().groups.emplace_back(); }
