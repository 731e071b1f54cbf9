// common/score.h and common/row_result.h on the CPU: softcaps of every size, and what becomes of a row of NaN scores.
#include <cmath>
#include <initializer_list>

#include "check.h"
#include "common/row_result.h"
#include "emulation/common/device.h"

namespace {

using broadhead::AttnParams;
using broadhead::finish_row;
using broadhead::RowResult;
using broadhead::ScoreScale;

// The error of a softcap is one of the score, not of the cap: also where the cap is as large as "off".
void check_softcaps() {
  for (const float softcap : {0.5f, 2.f, 30.f, 1e3f, 1e5f, 1e6f, 1e8f, 3e38f}) {
    ScoreScale scale;
    scale.set(0.125f, softcap);
    CHECK(scale.transform, "softcap %g", softcap);
    for (float score = 0.01f; score < 300.f; score *= 1.07f) {
      for (const float s : {score, -score}) {
        const double expected = softcap * std::tanh(0.125 * s / softcap);
        const double error = std::fabs(scale.cap(s) - expected);
        CHECK(error <= 1e-5 * std::fabs(expected), "softcap %g, score %g: %g, not %g", softcap, s, scale.cap(s),
              expected);
      }
    }
  }
}

RowResult finish(float max, float sum, const float* sinks, int split) {
  AttnParams params{};
  params.sinks = sinks;
  params.sinks_are_fp32 = 1;
  ScoreScale scale;
  scale.set(1.f, 0.f);
  return finish_row<float>(params, {true, 0, 0}, {max, sum}, scale, split);
}

// No score of such a row raises its maximum, but its sum is NaN, and so are its output and LSE: no sink hides it.
void check_rows_of_nan() {
  const float sink = 1.5f;
  for (const float* sinks : {static_cast<const float*>(nullptr), &sink}) {
    for (const int split : {-1, 0}) {
      const char* words = sinks == nullptr ? "without a sink" : "with a sink";
      const RowResult nan = finish(-INFINITY, NAN, sinks, split);
      CHECK(std::isnan(nan.inverse) && std::isnan(nan.lse), "%s, split %d: 1 / sum %g, LSE %g", words, split,
            nan.inverse, nan.lse);
      const RowResult empty = finish(-INFINITY, 0.f, sinks, split);
      CHECK(empty.inverse == 0.f && empty.lse == -INFINITY, "a row without keys, %s: LSE %g", words, empty.lse);
      const RowResult row = finish(0.5f, 2.f, sinks, split);
      const double sum = 2. + (sinks != nullptr && split < 0 ? std::exp(sink - 0.5) : 0.);
      CHECK(std::fabs(row.inverse - 1 / sum) < 1e-6 && std::fabs(row.lse - (0.5 + std::log(sum))) < 1e-6,
            "%s, split %d: 1 / sum %g, LSE %g", words, split, row.inverse, row.lse);
    }
  }
}

}  // namespace

int main() {
  check_softcaps();
  check_rows_of_nan();
  return host_test::finish();
}
