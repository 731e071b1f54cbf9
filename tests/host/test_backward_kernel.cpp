// The portable backward kernels on the CPU, at each way that their templates divide the work: index maps, masks, copies
// and barriers. Rows that no pair needs are NaN.
#include "backward_calls.h"
#include "check.h"

using namespace broadhead;

namespace {

template <class Traits>
int longest_row() {
  if constexpr (Traits::Keys::kFused) {
    return Traits::Keys::kRows;
  } else {
    return std::max(Traits::Keys::kRows, Traits::Queries::kRows);
  }
}

// The masks in turn; lengths cross the ends of tiles.
template <class Traits>
void check_masks(int calls, unsigned seed) {
  std::mt19937 random(seed);
  const auto between = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  for (int i = 0; i < calls; ++i) {
    Options options{};
    const int longest = longest_row<Traits>() + 50;
    options.seqlen_q = between(1, longest);
    options.seqlen_k = between(1, longest);
    options.heads = between(1, 2);
    options.head_dim = i % 2 == 0 ? Traits::kHeadDim : 8 * between(1, Traits::kHeadDim / 8);
    options.head_dim_v = i % 3 == 0 ? Traits::kHeadDim : 8 * between(1, Traits::kHeadDim / 8);
    options.window_left = options.window_right = -1;
    options.scale = (random() % 8 == 0 ? -1.f : 1.f) / std::sqrt(static_cast<float>(options.head_dim));
    options.softcap = random() % 3 == 0 ? 2.f : 0.f;
    switch (i % 6) {
      case 0:
        break;
      case 1:
        options.window_right = 0;
        break;
      case 2:
        options.window_left = between(0, 40), options.window_right = between(0, 40);
        break;
      case 3:
        options.attention_chunk = between(5, 90), options.window_right = between(-1, 0);
        break;
      case 4:
        options.window_right = 0, options.prefix = true;
        break;
      default:
        options.window_left = between(0, 60), options.window_right = 0, options.prefix = random() % 2 == 0;
    }
    options.ranges = i % 2 == 1 || random() % 2 == 0;
    options.in_window = random() % 2 == 0;
    options.causal_by_sequence = random() % 3 == 0;
    options.lse_by_head = random() % 3 == 0;
    const BackwardCall<typename Traits::Element> call(options, random);
    const std::string wrong = call.template run<Traits>(random() % 2 == 0);
    CHECK(wrong.empty(), "head_dim %d, call %d: %s", Traits::kHeadDim, i, wrong.c_str());
  }
}

}  // namespace

int main() {
  using bf16 = cutlass::bfloat16_t;
  using fp16 = cutlass::half_t;
  constexpr int kLimit = 227 * 1024;
  // Whole rows of S a warp; Q and dO in registers. Likewise through shared memory. Two warps of a row group, one stage.
  // Two warps with two stages. Four warps with eight columns each.
  check_masks<sm80::BackwardTraits<bf16, 64, 64, 32, 2, 1, 2, 1, 128, 32, 4, 1, 2, 1, kLimit>>(12, 1);
  check_masks<sm80::BackwardTraits<fp16, 96, 64, 32, 2, 1, 2, 1, 64, 32, 2, 1, 2, 1, kLimit>>(6, 2);
  check_masks<sm80::BackwardTraits<bf16, 128, 64, 32, 2, 2, 1, 1, 64, 64, 2, 2, 1, 1, kLimit>>(6, 3);
  check_masks<sm80::BackwardTraits<fp16, 192, 64, 64, 2, 2, 2, 1, 64, 16, 2, 2, 2, 1, kLimit>>(4, 4);
  check_masks<sm80::BackwardTraits<bf16, 320, 16, 32, 1, 4, 2, 1, 32, 32, 1, 4, 1, 1, kLimit>>(4, 5);
  // Fused: whole rows of S a warp; dS in rows of 128 bytes, in two subtiles of them, in rows of 64 bytes with one
  // stage; 16 queries of dQ a warp. Two warps of a row group.
  check_masks<sm80::FusedBackwardTraits<fp16, 128, 128, 64, 4, 1, 2, 1, kLimit>>(12, 6);
  check_masks<sm80::FusedBackwardTraits<bf16, 64, 128, 128, 4, 1, 2, 1, kLimit>>(6, 7);
  check_masks<sm80::FusedBackwardTraits<bf16, 128, 128, 32, 4, 1, 1, 1, kLimit>>(6, 8);
  check_masks<sm80::FusedBackwardTraits<bf16, 96, 128, 64, 4, 1, 2, 1, kLimit>>(4, 9);
  check_masks<sm80::FusedBackwardTraits<bf16, 192, 64, 64, 2, 2, 2, 1, kLimit>>(6, 10);
  check_masks<sm80::FusedBackwardTraits<fp16, 256, 64, 64, 2, 2, 1, 1, kLimit>>(4, 11);
  return host_test::finish();
}
