// kernels/append_kv.h: the owner of a packed token, the place of a cache row, and how threads share a row.
#include <climits>
#include <vector>

#include "check.h"
#include "kernels/append_kv.h"

namespace {

using broadhead::AppendKvParams;
using broadhead::cache_place;
using broadhead::find_sequence;
using broadhead::vector_pair;

void check_owners() {
  const std::vector<std::vector<std::int32_t>> offsets = {
      {0, 1, 2, 3, 4}, {0, 0, 5, 5, 5, 9, 9}, {3, 3, 4, 10}, {0, 0, 0}, {7, 7}, {0, 12}, {0, 1, 1, 1, 1, 1, 1, 30, 31}};
  for (const auto& cu : offsets) {
    const int batch = static_cast<int>(cu.size()) - 1;
    for (int token = 0; token < cu.back() + 4; ++token) {
      int owner = -1;
      for (int b = 0; b < batch; ++b) owner = cu[b] <= token && token < cu[b + 1] ? b : owner;
      for (int guess = 0; guess < batch + 3; ++guess) {
        const int found = find_sequence(cu.data(), batch, token, guess);
        CHECK(found == owner, "token %d of %d sequences, guess %d: %d, expected %d", token, batch, guess, found, owner);
      }
    }
  }
  // Out of order: the sequence that begins last has the row.
  const std::vector<std::vector<std::int32_t>> disordered = {
      {6, 2, 0, 6},  {0, 5, 3, 8},   {0, 4, 9, -1}, {0, 8, 3},
      {-3, 4, 5, 9}, {20, 5, 0, 20}, {4, 0, 9},     {INT_MIN, 3, INT_MAX, 7}};
  for (const auto& cu : disordered) {
    const int batch = static_cast<int>(cu.size()) - 1;
    for (int token = 0; token < 24; ++token) {
      int owner = -1, begins = -1, owners = 0;
      for (int b = 0; b < batch; ++b) {
        const int begin = cu[b] < 0 ? 0 : cu[b];
        const bool owns = begin <= token && token < cu[b + 1];
        owners += owns;
        if (owns && begin >= begins) owner = b, begins = begin;
      }
      for (int guess = 0; guess < batch + 3; ++guess) {
        const int found = find_sequence(cu.data(), batch, token, guess);
        const bool owns = found >= 0 && (cu[found] < 0 ? 0 : cu[found]) <= token && token < cu[found + 1];
        CHECK(found < 0 || owns, "token %d, guess %d: %d does not own it", token, guess, found);
        if (owners == 1) CHECK(found == owner, "token %d of %d, guess %d", token, owner, guess);
      }
    }
  }
  const std::int32_t none[] = {0};
  CHECK(find_sequence(none, 0, 0, 0) == -1, "no sequence owns anything");
}

void check_contiguous_places() {
  const std::int32_t index[] = {4, 0, 5, -1};
  AppendKvParams params{};
  params.num_blocks = params.num_owners = 5;
  params.block_size = 10;
  auto place = cache_place(params, 3, 9);
  CHECK(place.exists && place.block == 3 && place.slot == 9, "the last row of a sequence");
  CHECK(!cache_place(params, 3, 10).exists, "past the cache");
  CHECK(!cache_place(params, 3, (1LL << 31) + 5).exists, "far past the cache");
  CHECK(!cache_place(params, 3, -1).exists, "before the cache");
  params.cache_batch_idx = index;
  CHECK(cache_place(params, 0, 0).block == 4 && cache_place(params, 1, 2).block == 0, "rows by index");
  CHECK(!cache_place(params, 2, 0).exists && !cache_place(params, 3, 0).exists, "rows that the cache lacks");
}

void check_pages() {
  for (int page_size : {1, 3, 16}) {
    const std::int32_t table[] = {7, 2, -5, 99, 8, 0, 1000000, 3, 99, 99};  // 2 rows of 4 pages, 5 apart
    AppendKvParams params{};
    params.page_table = table;
    params.page_table_batch_stride = 5;
    params.num_owners = 2;
    params.max_pages = 4;
    params.num_blocks = 9;
    params.block_size = page_size;
    for (int b = 0; b < 2; ++b) {
      for (int row = 0; row < 6 * page_size; ++row) {
        const auto place = cache_place(params, b, row);
        const int column = row / page_size;
        const int page = column < 4 ? table[5 * b + column] : -1;
        const bool exists = page >= 0 && page < 9;
        CHECK(place.exists == exists, "page_size %d, row %d of %d", page_size, row, b);
        if (exists) CHECK(place.block == page && place.slot == row % page_size, "row %d of %d", row, b);
      }
    }
    CHECK(!cache_place(params, 0, (1LL << 32) - 2).exists, "the largest row there can be");
    CHECK(!cache_place(params, 2, 0).exists, "a row that the table lacks");
  }
}

void check_pairs() {
  for (int vectors = 1; vectors <= 40; ++vectors) {
    for (int pairs = 0; 2 * pairs <= vectors; ++pairs) {
      std::vector<int> moved(vectors, 0);
      for (int unit = 0; unit < broadhead::ceil_div(vectors, 2); ++unit) {
        const auto pair = vector_pair(unit, vectors, pairs);
        CHECK(pair.is_rotated == (unit < pairs), "unit %d of %d", unit, vectors);
        if (pair.is_rotated) CHECK(pair.has_second && pair.second == pair.first + pairs, "a pair of halves");
        CHECK(pair.first < vectors && (!pair.has_second || pair.second < vectors), "unit %d of %d", unit, vectors);
        ++moved[pair.first];
        if (pair.has_second) ++moved[pair.second];
        if (!pair.is_rotated) CHECK(pair.first >= 2 * pairs, "a vector outside the rotary columns");
      }
      for (int count : moved) CHECK(count == 1, "%d vectors, %d pairs: each is moved once", vectors, pairs);
    }
  }
}

}  // namespace

int main() {
  check_owners();
  check_contiguous_places();
  check_pages();
  check_pairs();
  return host_test::finish();
}
