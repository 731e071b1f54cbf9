// decode/stream_k.h on random batches: every n_block of every tile is in exactly one split, splits lie where the
// combine looks for them, and the CTAs of the grid get as much work as promised.
#include "decode_schedule.h"

namespace {

using namespace host_test;

// Without masks the same as with them, where lengths are not above what the call declared.
void check_sees_all(const Call& call) {
  DecodeParams params = call.params;
  if (!sees_all(params)) return;
  for (int b = 0; b < params.batch; ++b) {
    params.sees_all = 1;
    const SequenceWork fast = sequence_work(params, b, call.tile_m, call.tile_n);
    params.sees_all = 0;
    const SequenceWork work = sequence_work(params, b, call.tile_m, call.tile_n);
    const int seqlen_q = work.seqlen.seqlen_q;
    if (seqlen_q == 0 || seqlen_q > params.seqlen_q) continue;
    CHECK(fast.begin == work.begin && fast.end == work.end && fast.m_blocks == work.m_blocks, "sequence %d; %s", b,
          call.words().c_str());
    const auto mask = make_mask(params, work.seqlen, b);
    for (const auto& keys : {mask.tile_interval(0, seqlen_q - 1), mask.unmasked_interval(0, seqlen_q - 1)}) {
      CHECK(keys.begin == 0 && keys.end == work.seqlen.seqlen_k, "sequence %d: [%d, %d); %s", b, keys.begin, keys.end,
            call.words().c_str());
    }
    ++(params.mask_rule.window_right < 0 ? seen.unbounded : seen.one_token);
  }
}

}  // namespace

int main() {
  for (unsigned seed = 1; seed <= 12000; ++seed) {
    Call call;
    make_random_call(call, seed);
    Random random(seed);
    check_call(call, random);
    check_sees_all(call);
  }
  CHECK(seen.split_tiles && seen.passes && seen.rule_splits && seen.rule_whole && seen.unequal && seen.long_q &&
            seen.long_k && seen.fixed_splits && seen.only_cost && seen.unbounded && seen.one_token,
        "a kind of call was never drawn");
  return host_test::finish();
}
