// common/seqlen_info.h: where a sequence lies and how long it is, in every layout, and the clamps of wrong lengths.
#include "check.h"
#include "common/seqlen_info.h"

namespace {

using broadhead::AttnParams;
using broadhead::make_seqlen_info;

AttnParams dense() {
  AttnParams params{};
  params.batch = 3;
  params.seqlen_q = 7;
  params.seqlen_k = 20;
  return params;
}

void check_dense() {
  const auto info = make_seqlen_info(dense(), 2);
  CHECK(info.row_q == 0 && info.row_k == 0 && info.batch_q == 2 && info.batch_k == 2, "dense offsets");
  CHECK(info.seqlen_q == 7 && info.seqlen_k == 20, "dense lengths %d %d", info.seqlen_q, info.seqlen_k);
}

void check_packed() {
  const std::int32_t cu_q[] = {0, 3, 3, 8}, cu_k[] = {0, 10, 25, 25}, used_k[] = {4, 99, 1}, used_q[] = {2, 5, 5};
  AttnParams params = dense();
  params.cu_seqlens_q = cu_q;
  params.cu_seqlens_k = cu_k;
  const int starts_q[] = {0, 3, 3}, starts_k[] = {0, 10, 25}, lengths_q[] = {3, 0, 5}, lengths_k[] = {10, 15, 0};
  for (int b = 0; b < 3; ++b) {
    const auto info = make_seqlen_info(params, b);
    CHECK(info.row_q == starts_q[b] && info.row_k == starts_k[b], "packed offsets of %d", b);
    CHECK(info.seqlen_q == lengths_q[b] && info.seqlen_k == lengths_k[b], "packed lengths of %d", b);
    CHECK(info.batch_q == 0 && info.batch_k == 0, "packed sequences have no batch stride");
  }
  params.seqused_k = used_k;
  params.seqused_q = used_q;
  const int clamped_q[] = {2, 0, 5}, clamped_k[] = {4, 15, 0};
  for (int b = 0; b < 3; ++b) {
    const auto info = make_seqlen_info(params, b);
    CHECK(info.seqlen_q == clamped_q[b] && info.seqlen_k == clamped_k[b], "seqused in packed sequence %d", b);
  }
}

void check_cache() {
  const std::int32_t used[] = {20, 5, 1000}, pads[] = {0, 6, 3}, index[] = {2, 0, 1};
  AttnParams params = dense();
  params.seqused_k = used;
  CHECK(make_seqlen_info(params, 2).seqlen_k == 20, "a length beyond the cache is clamped to it");
  params.leftpad_k = pads;
  params.kv_batch_idx = index;
  const int rows[] = {0, 6, 3}, lengths[] = {20, 0, 17}, batches[] = {2, 0, 1};
  for (int b = 0; b < 3; ++b) {
    const auto info = make_seqlen_info(params, b);
    CHECK(info.row_k == rows[b] && info.seqlen_k == lengths[b], "leftpad of %d: row %lld, length %d", b,
          static_cast<long long>(info.row_k), info.seqlen_k);
    CHECK(info.batch_k == batches[b] && info.batch_q == b, "kv_batch_idx of %d", b);
  }
  const std::int32_t negative[] = {-4, -4, -4};
  params.seqused_k = negative;
  params.leftpad_k = nullptr;
  CHECK(make_seqlen_info(params, 0).seqlen_k == 0, "a negative length is an empty sequence");
}

}  // namespace

int main() {
  check_dense();
  check_packed();
  check_cache();
  return host_test::finish();
}
