// common/math.h and common/divisor.h against the standard library and the language.
#include <cmath>
#include <random>

#include "check.h"
#include "common/divisor.h"
#include "common/math.h"

using namespace broadhead;

void check_quotient(const Divisor& divisor, int n) {
  const int value = divisor;
  CHECK(divisor.quotient(n) == n / value, "%d / %d is not %d", n, value, divisor.quotient(n));
}

// Every value of up to 300 and some larger ones: at multiples, beside them, at both ends, and anywhere.
void test_divisor() {
  std::mt19937 random(std::random_device{}());
  const int most = 0x7fffffff;
  for (int i = 1; i <= 340; ++i) {
    const int value = i <= 300 ? i : static_cast<int>(random() % ((1 << 26) - 1)) + 1;
    const Divisor divisor(value);
    CHECK(static_cast<int>(divisor) == value, "the divisor is %d, not %d", static_cast<int>(divisor), value);
    for (int j = 0; j < 200; ++j) {
      const int n = static_cast<int>(random() & 0x7fffffff);
      check_quotient(divisor, n);
      check_quotient(divisor, j);
      check_quotient(divisor, most - j);
      const int multiple = n / value * value;
      check_quotient(divisor, multiple);
      if (multiple > 0) check_quotient(divisor, multiple - 1);
    }
  }
}

int main() {
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
  test_divisor();
  return host_test::finish();
}
