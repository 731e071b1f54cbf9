// common/seqlen_info.h: where a sequence lies and how long it is, in every layout, and what becomes of values out of
// range.
#include <climits>
#include <initializer_list>

#include "check.h"
#include "common/seqlen_info.h"

namespace {

using broadhead::AttnParams;
using broadhead::make_seqlen_info;
using broadhead::SeqlenInfo;

AttnParams dense() {
  AttnParams params{};
  params.batch = 3;
  params.seqlen_q = 7;
  params.seqlen_k = 20;
  params.num_kv_batches = 3;
  params.total_q = 21;
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
  params.total_q = 8;
  params.total_k = 25;
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
  // max_seqlen_k cuts nothing; rows from max_seqlen_q on are as those past seqused_q.
  params.seqlen_q = 4;
  params.seqlen_k = 3;
  const auto info = make_seqlen_info(params, 2);
  CHECK(info.seqlen_q == 4 && make_seqlen_info(params, 1).seqlen_k == 15, "bounds below the lengths");
}

void check_cache() {
  const std::int32_t used[] = {20, 5, 1000}, pads[] = {0, 6, 3}, index[] = {2, 0, 1};
  AttnParams params = dense();
  params.seqused_k = used;
  CHECK(make_seqlen_info(params, 2).seqlen_k == 20, "a length beyond the cache is clamped to it");
  params.leftpad_k = pads;
  params.kv_batch_idx = index;
  const int rows[] = {0, 5, 3}, lengths[] = {20, 0, 17}, batches[] = {2, 0, 1};
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
  params.seqused_k = nullptr;
  const std::int32_t wrong[] = {3, -1, INT_MAX};
  params.kv_batch_idx = wrong;
  for (int b = 0; b < 3; ++b) {
    const auto info = make_seqlen_info(params, b);
    CHECK(info.seqlen_k == 0 && info.batch_k == 0, "there is no key behind batch index %d", wrong[b]);
  }
}

// Whatever the values are, rows and keys lie within the tensors.
void check_any_values() {
  const std::int32_t values[] = {INT_MIN, INT_MIN + 1, -9, -1, 0, 1, 5, 8, 9, 21, 1 << 20, INT_MAX - 1, INT_MAX};
  for (const std::int32_t first : values) {
    for (const std::int32_t second : values) {
      for (const std::int32_t third : values) {
        const std::int32_t pair[] = {first, second};
        for (const int kind : {0, 1, 2}) {  // of K: dense, paged by a table of 2 rows, packed
          AttnParams params{};
          params.batch = 1;
          params.total_q = 9;
          params.seqlen_q = 8;
          params.seqlen_k = 20;
          params.num_kv_batches = 2;
          params.cu_seqlens_q = pair;
          params.seqused_q = &third;
          params.seqused_k = pair + 1;
          params.leftpad_k = &third;
          params.prefix_lens = pair;
          if (kind == 2) {
            params.cu_seqlens_k = pair;
            params.total_k = 21;
          } else {
            params.kv_batch_idx = pair;
          }
          const SeqlenInfo info = make_seqlen_info(params, 0);
          CHECK(info.seqlen_q >= 0 && info.row_q >= 0 && info.row_q + info.seqlen_q <= 9 && info.seqlen_q <= 8,
                "rows of (%d, %d), used %d", first, second, third);
          const int rows = kind == 2 ? 21 : 20;
          CHECK(info.seqlen_k >= 0 && info.row_k >= 0 && info.row_k + info.seqlen_k <= rows,
                "keys of (%d, %d), leftpad %d", first, second, third);
          CHECK(info.batch_k >= 0 && info.batch_k < 2 && info.batch_q == 0, "batch of %d", first);
          const int prefix = broadhead::sequence_prefix(params, 0, info.seqlen_k);
          CHECK(prefix >= 0 && prefix <= info.seqlen_k, "prefix of %d", first);
        }
      }
    }
  }
}

void check_pages() {
  AttnParams params{};
  params.num_pages = 9;
  for (const int page : {0, 3, 8}) CHECK(broadhead::page_exists(params, page), "page %d", page);
  for (const int page : {-1, 9, INT_MIN, INT_MAX}) CHECK(!broadhead::page_exists(params, page), "page %d", page);
  params.num_pages = 1ll << 31;
  CHECK(broadhead::page_exists(params, INT_MAX) && !broadhead::page_exists(params, -1), "the largest pool");
  params.num_pages = 0;
  CHECK(!broadhead::page_exists(params, 0), "an empty pool");
}

}  // namespace

int main() {
  check_dense();
  check_packed();
  check_cache();
  check_any_values();
  check_pages();
  return host_test::finish();
}
