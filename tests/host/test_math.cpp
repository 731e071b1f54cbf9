// common/math.h against the standard library.
#include <cmath>

#include "check.h"
#include "common/math.h"

int main() {
  using namespace broadhead;
  for (int b = 1; b <= 33; ++b) {
    for (int a = -200; a <= 200; ++a) {
      const double quotient = static_cast<double>(a) / b;
      CHECK(floor_div(a, b) == static_cast<int>(std::floor(quotient)), "floor_div(%d, %d)", a, b);
      if (a < 0) continue;
      CHECK(ceil_div(a, b) == static_cast<int>(std::ceil(quotient)), "ceil_div(%d, %d)", a, b);
      CHECK(round_up(a, b) >= a && round_up(a, b) < a + b && round_up(a, b) % b == 0, "round_up(%d, %d)", a, b);
    }
  }
  CHECK(min_int(-3, 2) == -3 && max_int(-3, 2) == 2, "min_int, max_int");
  return host_test::finish();
}
