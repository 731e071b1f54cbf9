// The host tests' assertions: CHECK prints what failed and where; `finish()` is the exit status of a test program.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace host_test {

inline int failures = 0;
inline long long checks = 0;

inline int finish() {
  std::printf("%lld checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace host_test

// `...`: a printf format with its arguments that says for which case.
#define CHECK(condition, ...)                                             \
  do {                                                                    \
    ++host_test::checks;                                                  \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                           \
      std::printf("\n");                                                  \
      if (++host_test::failures >= 20) std::exit(host_test::finish());    \
    }                                                                     \
  } while (false)
