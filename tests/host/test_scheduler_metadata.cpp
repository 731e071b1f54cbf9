// common/scheduler_metadata.h, kernels/scheduler_metadata.h: no content of a metadata buffer can ask for more splits
// than the launch has.
#include <climits>
#include <vector>

#include "check.h"
#include "common/scheduler_metadata.h"
#include "kernels/scheduler_metadata.h"

int main() {
  using broadhead::metadata_splits;
  constexpr int kTag = 12345;
  CHECK(metadata_splits(nullptr, 3, 1, kTag, 6) == 6, "no metadata: the launch decides");
  for (int batch : {1, 3, 4, 5, 9}) {
    const int slots = (batch + 3) / 4 * 4;
    for (int value : {INT_MIN, -1, 0, 1, 4, 6, 7, INT_MAX}) {
      std::vector<std::int32_t> metadata(1 + 4 * slots, 0);
      for (int b = 0; b < batch; ++b) {
        metadata[b] = value;
        metadata[slots + b] = kTag;
      }
      for (int b = 0; b < batch; ++b) {
        const int expected = value < 1 ? 1 : value > 6 ? 6 : value;
        CHECK(metadata_splits(metadata.data(), batch, b, kTag, 6) == expected, "%d splits asked for", value);
        CHECK(metadata_splits(metadata.data(), batch, b, kTag + 1, 6) == 1, "another call's metadata");
        CHECK(metadata_splits(metadata.data(), batch, b, kTag, 1) == 1, "an unsplit launch");
      }
    }
  }
  return host_test::finish();
}
